"""What a student's certificates rest on, in a file beside it: how sure it was of held-out answers, and which were right."""

from __future__ import annotations

import datetime
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.base import storage
from pipeline.base.config import Strict
from pipeline.base.errors import UserError
from pipeline.task.task import Task
from pipeline.task.values import Values, labels_of
from student.config import AnswerConfig
from student.data.answers import REFERENCES
from student.decode.answerer import FAMILIARITY, TOLERANCE, UP_TO, WHOLE, confidences
from student.evaluate.certificate import Evidence, Flags, Targets, certify, coverage, texts_to_certify

log = logging.getLogger(__name__)

EVIDENCE, CERTIFICATE = "evidence.json", "certificate.json"  # beside a student
LENGTH = "length of texts"
MOST_TEXTS = 20_000  # that are kept of each part, evenly spaced

Probability = Annotated[float, Field(ge=0, le=1)]


class KnownAnswers(Strict):
    """By text: the confidence in each field, whether the student's value is the right one, and `Familiarity.of` it."""

    confidence: list[list[Probability]]
    agrees: list[list[bool]]
    familiarity: list[Probability] = []

    @model_validator(mode="after")
    def _even(self) -> Self:
        if len(self.familiarity) not in (0, len(self.agrees)):
            raise ValueError("familiarity is not of the same texts as agrees")
        if [len(row) for row in self.confidence] != [len(row) for row in self.agrees]:
            raise ValueError("confidence and agrees are not of the same texts and fields")
        return self

    @classmethod
    def of(
        cls,
        truth: list[Values],
        found: list[Values | None],
        by_field: NDArray[np.float64],
        familiarity: NDArray[np.float64] | None = None,
    ) -> Self:
        """Of decoded answers; `by_field` is their confidence, [N, F], and `familiarity` that of the texts, [N]."""
        kept = np.unique(np.linspace(0, len(truth) - 1, min(MOST_TEXTS, len(truth))).astype(int)).tolist()
        said = [found[i] or (None,) * len(truth[i]) for i in kept]
        agrees = [[a == b for a, b in zip(mine, truth[i], strict=True)] for i, mine in zip(kept, said, strict=True)]
        familiar = [] if familiarity is None else familiarity[kept].round(4).tolist()
        return cls(confidence=by_field[kept].tolist(), agrees=agrees, familiarity=familiar)

    def evidence(self, fields: list[str], together: bool = False, unfamiliar: float = 0) -> Evidence:
        """For certificates.

        Args:
            together: whether a field's confidence is that in the answer up to it, not in it alone.
            unfamiliar: texts of less familiarity are nothing that the student answers alone.
        """
        confidence = np.reshape(np.array(self.confidence, np.float64), (-1, len(fields)))
        agrees = np.reshape(np.array(self.agrees, np.bool_), (-1, len(fields)))
        by_name: dict[str, Flags] = dict(zip(fields, agrees.T, strict=True))
        sure = confidences(confidence, fields)
        if unfamiliar:
            new = np.array(self.familiarity) < unfamiliar - TOLERANCE
            sure = {name: np.where(new, -np.inf, share) for name, share in sure.items()}
        named = {name: sure[UP_TO + name if together else name] for name in fields} | {WHOLE: sure[WHOLE]}
        return Evidence(named, by_name | {WHOLE: np.all(agrees, 1)})


class Held(Strict):
    """The content of evidence.json.

    Attributes:
        answers: whose they are, as in a manifest.
        measured_on: what `tests` are, in words.
        chooses: the validation answers.
        tests: answers that have chosen nothing.
        mix: how often the student gave each value there, by field in the task's order, and how many texts had each `LENGTH`.
        cuts: characters that part the lengths.
    """

    answers: Literal["teacher", "given"]
    measured_on: str
    measured: datetime.date
    chooses: KnownAnswers
    tests: KnownAnswers
    mix: dict[str, list[int]]
    cuts: list[int]

    def evidence(self, fields: list[str], targets: Targets, unfamiliar: float = 0) -> tuple[Evidence, Evidence, bool]:
        """What chooses and what tests, under the confidence by which more texts meet the targets, and which one it is.

        A field that hangs on those before it is right only if they are, whatever its own confidence given them; one that
        does not is sure where they are not.
        """
        ways = {together: self.chooses.evidence(fields, together, unfamiliar) for together in (False, True)}
        best = coverage(targets, ways[True]) > coverage(targets, ways[False])
        return ways[best], self.tests.evidence(fields, best, unfamiliar), best


@dataclass(frozen=True)
class Certificate:
    """With 95 % confidence, of the answers to texts like those it was measured on, that are surer than its thresholds, at
    least the targets' shares are the teacher's.

    Attributes:
        targets: by field, or `WHOLE`.
        thresholds: the least confidence, by its name, with which an answer is the student's own, and the least familiarity.
        bounds: what is certified, of each target: at least itself.
        coverage: share of the texts that the student answers alone.
        texts: that this was measured on, and `alone` of them by the student.
        answers: whose answers it was held against, as in a manifest.
    """

    targets: dict[str, float]
    thresholds: dict[str, float]
    bounds: dict[str, float]
    coverage: float
    texts: int
    alone: int
    answers: Literal["teacher", "given"]
    measured_on: str
    measured: datetime.date

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"measured": self.measured.isoformat(), "says": str(self)}

    def __str__(self) -> str:
        own, shares = REFERENCES[self.answers].own, _named(self.bounds)
        return (
            f"certified with 95 % confidence: where the student answers alone, on {100 * self.coverage:.1f} % of texts, at "
            f"least {shares} are {own}; measured on {self.measured_on}, {self.texts:,} texts"
        )


def mix_of(task: Task, answers: list[Values | None], texts: Iterable[str]) -> tuple[dict[str, list[int]], list[int]]:
    """`Held.mix` and `Held.cuts`, these at the deciles of the texts' lengths."""
    lengths = [len(text) for text in texts]
    cuts = np.unique(np.quantile(lengths, np.arange(0.1, 1, 0.1), method="nearest")).tolist()
    bins = np.bincount(np.searchsorted(cuts, lengths, side="right"), minlength=len(cuts) + 1)
    known = [answer for answer in answers if answer]  # by `repr`, as JSON tells true from 1
    counts = [Counter(repr(label) for answer in known for label in labels_of(answer[i])) for i in range(len(task.fields))]
    mix = {name: [counts[i][repr(value)] for value in values] for i, (name, values) in enumerate(task.fields.items())}
    return mix | {LENGTH: bins.tolist()}, cuts


def targets_of(config: AnswerConfig) -> dict[str, float]:
    """What a configuration asks for, by field, or `WHOLE`."""
    return config.agree_fields | ({WHOLE: config.agree} if config.agree is not None else {})


def thresholds_of(config: AnswerConfig, folder: str, task: Task) -> tuple[dict[str, float], Certificate | None]:
    """The least confidences with which a student's answers are its own, and the certificate that they rest on, if any.

    Raises:
        UserError: what is asked for cannot be certified, or there is nobody to give the other answers.
    """
    if not config.certified:
        least = {WHOLE: config.fallback, FAMILIARITY: config.unfamiliar}
        return {name: share for name, share in least.items() if share is not None}, None
    if config.teacher is None:
        raise UserError("the answers that the student is not sure enough of need a teacher: name it (--teacher)")
    found = certificate(load_evidence(folder, task), task, targets_of(config), config.unfamiliar or 0)
    log.info("%s", found)
    return found.thresholds, found


def load_evidence(folder: str, task: Task) -> Held:
    """What an evaluation left beside a student.

    Raises:
        UserError: there is none, or it is damaged or not of the task.
    """
    path = storage.join(folder, EVIDENCE)
    if not storage.exists(path):
        raise UserError(f"nothing in {folder} says how often the student agrees: run `retort evaluate` first")
    held = storage.read_form(path, Held)
    sizes = {name: len(values) for name, values in task.fields.items()} | {LENGTH: len(held.cuts) + 1}
    rows = [row for part in (held.chooses, held.tests) for row in part.confidence]
    if any(len(row) != len(task.fields) for row in rows) or {n: len(counts) for n, counts in held.mix.items()} != sizes:
        raise UserError(f"{path} does not fit the task beside it: it is of other fields")
    return held


def certificate(held: Held, task: Task, targets: Targets, unfamiliar: float = 0) -> Certificate:
    """What can be certified, where texts of less familiarity than `unfamiliar` are the teacher's.

    Raises:
        UserError: a target names no field, or nothing passes; the message says how many texts it would take.
    """
    if unknown := targets.keys() - task.fields.keys() - {WHOLE}:
        raise UserError(f"the task has no field {min(unknown)!r}: its fields are {', '.join(task.fields)}")
    if unfamiliar and not (held.chooses.familiarity and held.tests.familiarity):
        raise UserError("the evaluation does not say how familiar its texts are: run `retort evaluate` again")
    chooses, tests, together = held.evidence(list(task.fields), targets, unfamiliar)
    found = certify(targets, chooses, tests)
    if found is None:
        raise UserError(_refusal(held, targets, texts_to_certify(targets, tests)))
    return Certificate(
        targets=dict(targets),
        thresholds={
            UP_TO + name if together and name != WHOLE else name: max(0.0, 1 - found.limit * (1 - share))
            for name, share in targets.items()
        }
        | ({FAMILIARITY: unfamiliar} if unfamiliar else {}),
        bounds={name: found.bound(name) for name in targets},
        coverage=found.alone / found.texts,
        texts=found.texts,
        alone=found.alone,
        answers=held.answers,
        measured_on=held.measured_on,
        measured=held.measured,
    )


def _refusal(held: Held, targets: Targets, needed: int | None) -> str:
    texts, own = len(held.tests.agrees), REFERENCES[held.answers].own
    reason = f"no confidence certifies that {_named(targets)} are {own}, by {held.measured_on}"
    if needed is None:
        return f"{reason} ({texts:,} texts): even the answers it is surest of are so less often. Ask for less, or train on more"
    return (
        f"{reason}: it takes about {needed:,} texts, and there are {texts:,}. Give more, that were not trained on: "
        "`retort evaluate --certify-on SHARDS`"
    )


def _named(shares: Targets) -> str:
    parts = {name: "" if name == WHOLE else f" to {name!r}" for name in shares}
    return " and ".join(f"{100 * shares[name]:.4g} % of its answers{to}" for name, to in parts.items())
