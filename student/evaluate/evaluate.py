"""`retort evaluate`: the fidelity of a student on the test split, as `fidelity.json` and one self-contained HTML page."""

from __future__ import annotations

import datetime
import heapq
import json
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.tracking import Tracking, field_metric
from pipeline.comments.reading import KEPT, filter_rows, text_key, text_row
from pipeline.shards.manifest import Shards, open_shards
from pipeline.task.compiled import require_same
from pipeline.task.task import Task
from pipeline.task.values import Values
from student.config import AnswerConfig, FloorsConfig, TrainConfig
from student.data.answers import gold_answers, parse_all, teacher_answers
from student.data.examples import Examples, open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION, unpack
from student.decode.answerer import WHOLE, confidences
from student.decode.decode import Decoded
from student.decode.familiarity import TRAINED_ON, Familiarity
from student.evaluate.evidence import CERTIFICATE, EVIDENCE, Held, KnownAnswers, certificate, mix_of, targets_of
from student.evaluate.fidelity import agreement, matches, step_measures, trust
from student.evaluate.floors import fit_floors
from student.evaluate.gold import against_gold, suspects
from student.evaluate.parts import (
    ANSWERS,
    FREE,
    OTHERS,
    STEPS,
    TEMPERATURES,
    Part,
    Work,
    carry_out,
    parts_of,
    read_decoded,
    read_measured,
)
from student.evaluate.report import render
from student.model.checkpoint import Trained, load_student, load_training, save_temperatures
from student.registry.mlflow_model import log_report, log_student

log = logging.getLogger(__name__)

SUSPECTS, PAGE, FIGURES = REPORT = "suspects.jsonl", "fidelity.html", "fidelity.json"
DOUBTED_TRAINING = 10_000  # training texts that are looked through for suspects, at most
LARGE = 200_000  # comments to decode from which Ray's start pays
USUAL = (0.9, 0.95, 0.99)  # shares of whole answers that every report tries to certify
NOTHING_ASKED = AnswerConfig()


def evaluate(
    floors: FloorsConfig,
    train: TrainConfig,
    shards_folder: str,
    student_folder: str,
    report_folder: str,
    asked: AnswerConfig = NOTHING_ASKED,
    others: str | None = None,
) -> dict[str, Any]:
    """Measures a student against its teacher, writes the report, and tells MLflow; returns what fidelity.json holds.

    Args:
        train: the training on whose machines it is done, where there is much to do, or a cluster.
        asked: what to certify beside the usual shares.
        others: another folder of shards, whose answers certify instead of the test split's.

    Raises:
        UserError: student and shards do not fit, or the test split is empty.
    """
    figures = measure(floors, shards_folder, student_folder, report_folder, asked, others, train)
    try:
        track(figures, student_folder, report_folder)
    except (MlflowException, UserError) as error:
        uri = figures["training"]["mlflow"]["uri"]
        log.warning("the figures are not in MLflow at %s: %s", uri, error)
    return figures


def measure(
    floors: FloorsConfig,
    shards_folder: str,
    student_folder: str,
    report_folder: str,
    asked: AnswerConfig = NOTHING_ASKED,
    others: str | None = None,
    train: TrainConfig | None = None,
) -> dict[str, Any]:
    """Measures a student against its teacher and writes the report; see `evaluate`.

    Args:
        train: see `evaluate`; None does it in this process, which may be a worker of Ray itself.

    Raises:
        UserError: student and shards do not fit, or the test split is empty.
    """
    shards, student, report = (storage.absolute(folder) for folder in (shards_folder, student_folder, report_folder))
    work = Work(shards, student, report, None if others is None else storage.absolute(others))
    evaluated = _Evaluated(work, train)
    save_temperatures(student_folder, evaluated.temperatures)
    held = evaluated.held()
    evaluated.familiarity.save(student_folder)
    storage.write_json(storage.join(student_folder, EVIDENCE), held.model_dump(mode="json"))
    figures = evaluated.figures(floors)
    figures["certified_on"] = held.measured_on
    figures["certificates"] = _certificates(held, evaluated.task, asked, student_folder)
    with storage.writing(storage.join(report_folder, SUSPECTS)) as stream:
        for row in evaluated.suspects():
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    storage.write_text(storage.join(report_folder, PAGE), render(figures))
    storage.write_json(storage.join(report_folder, FIGURES), figures)
    work.forget()
    return figures


class _Evaluated:
    """What a student answered to the examples it is measured on, of which little more than a number each is in memory.

    Attributes:
        temperatures: by field, fitted on the validation split.
        familiarity: by texts of the training and the validation split.
        truth: the answers in the test split, and `answers` the student's.

    Raises:
        UserError: see `evaluate`.
    """

    def __init__(self, work: Work, train: TrainConfig | None) -> None:
        student, self._compiled = load_student(work.student)  # damaged weights are refused before shards are unpacked
        self._work, self._shards, self._training = work, open_shards(work.shards), load_training(work.student)
        shape = student.shape
        del student  # the workers have their own
        require_same(self._compiled.hashes, self._shards.compiled.hashes, work.student, work.shards)
        self._splits = {
            split: open_examples(self._shards, split, shape.sequence, shape.separator) for split in (TEST, VALIDATION, TRAIN)
        }
        self._test, self._validation, self.task = self._splits[TEST], self._splits[VALIDATION], self._compiled.task
        log.info("evaluating on %s test comments", f"{len(self._test):,}")
        self._others, self._known_others = ([], []) if work.others is None else self._texts_of(work.others)
        self._doubted = self._splits[TRAIN].first(DOUBTED_TRAINING)
        self._parts = self._make_parts()
        todo = [part for parts in self._parts.values() for part in parts]
        self._train = train if _spreading_pays(sum(part.stop - part.start for part in todo)) else None
        self._speed = carry_out(work, todo, self._train)
        self.temperatures: dict[str, float] = storage.read_json(storage.join(work.parts, TEMPERATURES))
        self._decoded, self._seconds = self._read(ANSWERS, TEST)
        self.truth, self.answers = teacher_answers(self._test), parse_all(self._compiled, self._decoded.tokens)
        self._chooses, _ = self._read(ANSWERS, VALIDATION)
        trained_on = _texts(self._splits[TRAIN], TRAINED_ON)
        self.familiarity = Familiarity.fit(list(trained_on), _texts(self._validation), self._confidence(self._chooses))

    def _make_parts(self) -> dict[tuple[str, str], list[Part]]:
        """All there is to do, by kind and split."""
        test, held, doubted = map(len, (self._test, self._validation, self._doubted))
        wanted = {(ANSWERS, TEST): test, (FREE, TEST): test, (STEPS, TEST): test}
        wanted |= {(ANSWERS, VALIDATION): held, (ANSWERS, TRAIN): doubted, (ANSWERS, OTHERS): len(self._others)}
        texts = {OTHERS: self._others}
        return {(kind, split): parts_of(kind, split, count, texts.get(split, [])) for (kind, split), count in wanted.items()}

    def _read(self, kind: str, split: str) -> tuple[Decoded, float]:
        return read_decoded(self._work, self._parts[kind, split])

    def held(self) -> Held:
        """What certifies: the test split's answers, or those in another folder of shards."""
        mix, cuts = mix_of(self.task, self.answers, _texts(self._test))
        tests = self._known(_texts(self._test), self.truth, self._decoded)
        if self._work.others is not None:
            tests = self._known(self._others, self._known_others, self._read(ANSWERS, OTHERS)[0])
        return Held(
            answers=self._shards.manifest.answers,
            measured_on="the test split" if self._work.others is None else "texts given for it",
            measured=datetime.date.today(),
            chooses=self._known(_texts(self._validation), teacher_answers(self._validation), self._chooses),
            tests=tests,
            mix=mix,
            cuts=cuts,
        )

    def _known(self, texts: Iterable[str], truth: list[Values], decoded: Decoded) -> KnownAnswers:
        familiarity = self.familiarity.of(texts, self._confidence(decoded))
        return KnownAnswers.of(truth, parse_all(self._compiled, decoded.tokens), decoded.by_field, familiarity)

    def _confidence(self, decoded: Decoded) -> NDArray[np.float64]:
        return confidences(decoded.by_field, list(self.task.fields))[WHOLE]

    def _texts_of(self, folder: str) -> tuple[list[str], list[Values]]:
        """The texts of other shards of its task, whatever their tokenizer, that the student takes, and their answers.

        Raises:
            UserError: the shards are of another task, or of nothing but texts that it was trained on, or does not take.
        """
        shards = open_shards(folder)
        require_same({"task": self.task.hash}, {"task": shards.compiled.task.hash}, self._work.student, folder)
        known = dict(_texts_and_answers(shards))
        new = ~np.isin(_keys(known), _keys(_texts(self._splits[TRAIN])))
        rows = [text_row(i, text) for i, (text, is_new) in enumerate(zip(known, new, strict=True)) if is_new]
        rows = filter_rows(rows, self.task.comments, self._compiled.tokenizer)
        texts = [row.text for row in rows if row.status == KEPT]
        if not texts:
            raise UserError("every text that was to certify the student was trained on: name shards of others")
        return texts, [known[text] for text in texts]

    def figures(self, floors: FloorsConfig) -> dict[str, Any]:
        """What fidelity.json holds but for the certificates."""
        free, _ = self._read(FREE, TEST)
        test, train = len(self._test), len(self._splits[TRAIN])
        speed = _speed(self._shards, self._decoded, self._seconds, self._speed)
        right = matches(self.truth, self.answers)
        return {
            "task": self.task.name,
            "answers": self._shards.manifest.answers,
            "examples": {"test": test, "train": train, "floors": min(floors.examples, train)},
            "student": agreement(self.task, self.truth, self.answers),
            "unconstrained": agreement(self.task, self.truth, parse_all(self._compiled, free.tokens)),
            "floors": fit_floors(floors, self._shards, self._splits, self._train),
            "confidence": {"temperatures": self.temperatures} | trust(self._decoded.confidence, right),
            "steps": self._steps(),
            "sizes": _sizes(self._training, self._shards),
            "speed": speed,
            "training": self._training.model_dump(mode="json", exclude_unset=True),
            "gold": against_gold(self.task, gold_answers(self._test), self.truth, self.answers),
        }

    def _steps(self) -> dict[str, Any]:
        sums, close = read_measured(self._work, self._parts[STEPS, TEST])
        steps = step_measures(sums) | {"close_answers": close / len(self._test)}
        if self._shards.manifest.answers == "given":
            steps |= {"kl": None, "choice_kl": None, "close_answers": None}  # of a teacher that did not give these answers
        return steps

    def suspects(self) -> Iterator[dict[str, Any]]:
        """Test and training texts that the student answers otherwise, the surest first."""
        learnt, _ = self._read(ANSWERS, TRAIN)
        doubted = _doubted(TEST, self._test, self._decoded), _doubted(TRAIN, self._doubted, learnt)
        return heapq.merge(*doubted, key=lambda row: -row["confidence"])


def _spreading_pays(comments: int) -> bool:
    """Whether workers of Ray, of which each takes seconds to start, are to do so much.

    On a cluster always: the driver's machine may have no GPU, and other work to do.
    """
    return bool(os.environ.get("RAY_ADDRESS")) or comments > LARGE


def _texts(examples: Examples, most: int | None = None) -> Iterator[str]:
    """All, or at most so many, evenly spaced."""
    rows = np.linspace(0, len(examples) - 1, min(most or len(examples), len(examples))).astype(int)
    return (examples.text(int(i)) for i in rows)


def _keys(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Eight bytes that tell each text apart, but for its case and spacing."""
    return np.fromiter((int.from_bytes(text_key(text)[:8]) for text in texts), np.uint64)


def _texts_and_answers(shards: Shards) -> Iterator[tuple[str, Values]]:
    """All that shards hold."""
    for split, columns in unpack(shards).items():
        if columns and len(columns["choice_starts"]) > 1:
            examples = open_examples(shards, split, "choices")
            yield from zip(map(examples.text, range(len(examples))), teacher_answers(examples), strict=True)


def _certificates(held: Held, task: Task, asked: AnswerConfig, student_folder: str) -> list[dict[str, Any]]:
    """What can be certified, or why it cannot: of the usual shares, and last of what is asked for, which is kept."""
    rows, usual = [], [AnswerConfig(agree=share) for share in USUAL]
    for one in [*usual, *([asked] if asked.certified else [])]:
        wanted = targets_of(one)
        try:
            found, refusal = certificate(held, task, wanted, one.unfamiliar or 0).as_dict(), None
        except UserError as error:
            found, refusal = None, str(error)
        rows.append({"targets": wanted, "certificate": found, "refusal": refusal})
    if asked.certified and rows[-1]["certificate"]:
        storage.write_json(storage.join(student_folder, CERTIFICATE), rows[-1]["certificate"])
    return rows


def _doubted(split: str, examples: Examples, decoded: Decoded) -> Iterator[dict[str, Any]]:
    """The suspects of a split."""
    compiled, answers = examples.compiled, parse_all(examples.compiled, decoded.tokens)
    truth, gold = teacher_answers(examples), gold_answers(examples)
    found = suspects(compiled.task, examples.text, gold, truth, answers, decoded.confidence)
    return ({"split": split} | row for row in found)


def track(figures: dict[str, Any], student_folder: str, report_folder: str) -> str:
    """Puts the figures, the report and the student beside the training's metrics in MLflow; returns the model's URI there.

    Raises:
        MlflowException: the run cannot be reached.
        UserError: its artifacts cannot.
    """
    training, student, speed = Trained.model_validate(figures["training"]), figures["student"], figures["speed"]
    parameters = figures["sizes"]["student_parts"]
    rows = {
        "parameters": sum(parameters.values()),
        "parameters_without_embedding": parameters["rest"],
        "test/comments": figures["examples"]["test"],
        "test/whole": student["whole"],
        **{field_metric(name): share for name, share in student["fields"].items()},
        **{
            field_metric(f"{name} {kind} F1"): f1
            for name, both in student.get("labels", {}).items()
            for kind, f1 in both.items()
        },
        "test/valid_unconstrained": figures["unconstrained"]["valid"],
        "test/choice_accuracy": figures["steps"]["choice_accuracy"],
        "test/choice_kl": figures["steps"]["choice_kl"],
        "test/ece": figures["steps"]["calibration"]["ece"],
        **({f"gold/{who}": figures["gold"][who]["whole"][0] for who in ("reference", "student")} if figures["gold"] else {}),
        **{
            f"certified/{row['targets'][WHOLE]:g}": row["certificate"]["coverage"] if row["certificate"] else 0.0
            for row in figures["certificates"][: len(USUAL)]
        },
        **{f"floor/{name}": floor["whole"] for name, floor in figures["floors"].items()},
        "speed/answers_per_second": speed["student_answers_per_second"],
        "speed/latency_ms": speed["latency_ms"],
        **{f"cost/{name}": seconds for name, seconds in training.cost.items()},
    }
    uri, run_id = training.mlflow.uri, training.mlflow.run
    Tracking(uri, run_id).log([(0, {name: float(value) for name, value in rows.items() if value is not None})])
    log_report(uri, run_id, report_folder)
    return log_student(uri, run_id, student_folder)


def _sizes(training: Trained, shards: Shards) -> dict[str, Any]:
    counts = training.parameters.model_dump()
    return {"student": sum(counts.values()), "student_parts": counts, "teacher": shards.manifest.teacher.parameters}


def _speed(shards: Shards, decoded: Decoded, seconds: float, measured: dict[str, Any]) -> dict[str, Any]:
    """Answers a second, each as measured where it ran: the teacher during extraction, one worker with the student just now.

    The teacher's is None where it gave no answers, only scored them, or where the shards do not say: they came from JSON lines.
    """
    rows, took = shards.manifest.rows, shards.manifest.teacher_seconds
    teacher = rows / took if took and shards.manifest.answers == "teacher" else None
    student, spent = len(decoded.tokens) / seconds, shards.manifest.teacher.spent
    return {
        "teacher_answers_per_second": teacher,
        "student_answers_per_second": student,
        "ratio": student / teacher if teacher else None,
        "teacher_million_cost": None if spent is None or spent.cost is None else 1e6 * spent.cost / rows,
        "student_million_seconds": 1e6 / student,
        "student_batches": decoded.calls,
    } | measured
