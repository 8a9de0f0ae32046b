"""`retort evaluate`: the fidelity of a student on the test split, as `fidelity.json` and one self-contained HTML page."""

from __future__ import annotations

import datetime
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.console import progress
from pipeline.base.errors import UserError
from pipeline.base.tracking import Tracking, field_metric
from pipeline.comments.reading import KEPT, filter_rows, text_key, text_row
from pipeline.shards.manifest import Shards, open_shards
from pipeline.task.compiled import require_same
from pipeline.task.task import Task
from pipeline.task.values import Values
from student.config import AnswerConfig, FloorsConfig
from student.data.answers import gold_answers, parse_all, teacher_answers
from student.data.examples import Batch, Examples, open_examples, student_examples
from student.data.unpack import TEST, TRAIN, VALIDATION, unpack
from student.decode.answerer import WHOLE, confidences, prefixes_of
from student.decode.decode import Decoded, Decoder, Prefixes
from student.decode.familiarity import TRAINED_ON, Familiarity
from student.evaluate.calibrate import fit_temperatures
from student.evaluate.evidence import CERTIFICATE, EVIDENCE, Held, KnownAnswers, certificate, mix_of, targets_of
from student.evaluate.fidelity import agreement, close_answers, matches, step_measures, trust
from student.evaluate.floors import fit_floors
from student.evaluate.gold import against_gold, suspects
from student.evaluate.report import render
from student.evaluate.speed import latency_ms
from student.model.checkpoint import Trained, load_student, load_training, require_student, save_temperatures
from student.model.model import Student
from student.registry.mlflow_model import log_report, log_student

log = logging.getLogger(__name__)

SUSPECTS, PAGE, FIGURES = REPORT = "suspects.jsonl", "fidelity.html", "fidelity.json"
DOUBTED_TRAINING = 10_000  # training texts that are looked through for suspects, at most
BATCH_SIZE = 128  # answers the student decodes together
USUAL = (0.9, 0.95, 0.99)  # shares of whole answers that every report tries to certify
NOTHING_ASKED = AnswerConfig()


def evaluate(
    floors: FloorsConfig,
    shards_folder: str,
    student_folder: str,
    report_folder: str,
    asked: AnswerConfig = NOTHING_ASKED,
    others: str | None = None,
) -> dict[str, Any]:
    """Measures a student against its teacher, writes the report, and tells MLflow; returns what fidelity.json holds.

    Args:
        asked: what to certify beside the usual shares.
        others: another folder of shards, whose answers certify instead of the test split's.

    Raises:
        UserError: student and shards do not fit, or the test split is empty.
    """
    figures = measure(floors, shards_folder, student_folder, report_folder, asked, others)
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
) -> dict[str, Any]:
    """Measures a student against its teacher and writes the report; see `evaluate`.

    Raises:
        UserError: student and shards do not fit, or the test split is empty.
    """
    student = _Evaluated(shards_folder, student_folder)
    save_temperatures(student_folder, student.temperatures)
    held = student.held(others)
    student.familiarity.save(student_folder)
    storage.write_json(storage.join(student_folder, EVIDENCE), held.model_dump(mode="json"))
    figures = student.figures(floors)
    figures["certified_on"] = held.measured_on
    figures["certificates"] = _certificates(held, student.task, asked, student_folder)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in student.suspects())
    storage.write_text(storage.join(report_folder, SUSPECTS), "".join(lines))
    storage.write_text(storage.join(report_folder, PAGE), render(figures))
    storage.write_json(storage.join(report_folder, FIGURES), figures)
    return figures


class _Evaluated:
    """A student, the examples it is measured on, and what it answers to the test split.

    Attributes:
        temperatures: by field, fitted on the validation split.
        familiarity: by texts of the training and the validation split.
        truth: the answers in the test split, and `answers` the student's.

    Raises:
        UserError: see `evaluate`.
    """

    def __init__(self, shards_folder: str, folder: str) -> None:
        require_student(folder)
        self._folder, self._shards, self._training = folder, open_shards(shards_folder), load_training(folder)
        self._model, self._compiled = load_student(folder, "cuda" if torch.cuda.is_available() else "cpu")
        require_same(self._compiled.hashes, self._shards.compiled.hashes, folder, shards_folder)
        self._splits = {split: student_examples(self._shards, split, self._model) for split in (TEST, VALIDATION, TRAIN)}
        self._test, self.task = self._splits[TEST], self._compiled.task
        log.info("evaluating on %s test comments", f"{len(self._test):,}")
        self.temperatures = fit_temperatures(self._model, self._compiled, _batches(self._splits[VALIDATION], BATCH_SIZE))
        self._decode = Decoder(self._model, self._compiled, self.temperatures).constrained
        self._decoded, self._seconds = _decode_all(self._decode, self._test, BATCH_SIZE, "decoding")
        self.truth, self.answers = teacher_answers(self._test), parse_all(self._compiled, self._decoded.tokens)
        self._validation = self._splits[VALIDATION]
        self._chooses, _ = _decode_all(self._decode, self._validation, BATCH_SIZE, "decoding what certifies")
        trained_on = _texts(self._splits[TRAIN], TRAINED_ON)
        self.familiarity = Familiarity.fit(trained_on, _texts(self._validation), self._confidence(self._chooses))

    def held(self, others: str | None) -> Held:
        """What certifies: the test split's answers, or those in another folder of shards."""
        texts = _texts(self._test)
        mix, cuts = mix_of(self.task, self.answers, texts)
        return Held(
            answers=self._shards.manifest.answers,
            measured_on="the test split" if others is None else "texts given for it",
            measured=datetime.date.today(),
            chooses=self._known(_texts(self._validation), teacher_answers(self._validation), self._chooses),
            tests=self._known(texts, self.truth, self._decoded) if others is None else self._others(others),
            mix=mix,
            cuts=cuts,
        )

    def _known(self, texts: list[str], truth: list[Values], decoded: Decoded) -> KnownAnswers:
        familiarity = self.familiarity.of(texts, self._confidence(decoded))
        return KnownAnswers.of(truth, parse_all(self._compiled, decoded.tokens), decoded.by_field, familiarity)

    def _confidence(self, decoded: Decoded) -> NDArray[np.float64]:
        return confidences(decoded.by_field, list(self.task.fields))[WHOLE]

    def _others(self, folder: str) -> KnownAnswers:
        """What the student says to the texts of other shards of its task, whatever their tokenizer.

        Raises:
            UserError: the shards are of another task, or of nothing but texts that it was trained on, or does not take.
        """
        train, shards = self._splits[TRAIN], open_shards(folder)
        require_same({"task": self.task.hash}, {"task": shards.compiled.task.hash}, self._folder, folder)
        seen = {text_key(train.text(i)) for i in range(len(train))}
        known = {text: values for text, values in _texts_and_answers(shards) if text_key(text) not in seen}
        rows = [text_row(i, text) for i, text in enumerate(known)]
        rows = [row for row in filter_rows(rows, self.task.comments, self._compiled.tokenizer) if row.status == KEPT]
        if not rows:
            raise UserError("every text that was to certify the student was trained on: name shards of others")
        prefixes = prefixes_of(self._model, self._compiled, rows)
        decoded, _ = _decode_all(self._decode, prefixes, BATCH_SIZE, "decoding what certifies")
        texts = [row.text for row in rows]
        return self._known(texts, [known[text] for text in texts], decoded)

    def figures(self, floors: FloorsConfig) -> dict[str, Any]:
        """What fidelity.json holds but for the certificates."""
        free, _ = _decode_all(Decoder(self._model, self._compiled).free, self._test, BATCH_SIZE, "decoding freely")
        test, train, speed = len(self._test), len(self._splits[TRAIN]), _speed(self._shards, self._decoded, self._seconds)
        right = matches(self.truth, self.answers)
        return {
            "task": self.task.name,
            "answers": self._shards.manifest.answers,
            "examples": {"test": test, "train": train, "floors": min(floors.examples, train)},
            "student": agreement(self.task, self.truth, self.answers),
            "unconstrained": agreement(self.task, self.truth, parse_all(self._compiled, free.tokens)),
            "floors": fit_floors(floors, self._shards, self._splits),
            "confidence": {"temperatures": self.temperatures} | trust(self._decoded.confidence, right),
            "steps": self._steps(),
            "sizes": _sizes(self._model, self._shards),
            "speed": speed | {"latency_ms": latency_ms(self._model, self._compiled, self._test)},
            "training": self._training.model_dump(mode="json", exclude_unset=True),
            "gold": against_gold(self.task, gold_answers(self._test), self.truth, self.answers),
        }

    def _steps(self) -> dict[str, Any]:
        close = close_answers(self._compiled, _batches(self._test, BATCH_SIZE))
        steps = step_measures(self._model, _batches(self._test, BATCH_SIZE)) | {"close_answers": close}
        if self._shards.manifest.answers == "given":
            steps |= {"kl": None, "choice_kl": None, "close_answers": None}  # of a teacher that did not give these answers
        return steps

    def suspects(self) -> list[dict[str, Any]]:
        """Test and training texts that the student answers otherwise, the surest first."""
        some = self._splits[TRAIN].first(DOUBTED_TRAINING)
        learnt, _ = _decode_all(self._decode, some, BATCH_SIZE, "looking for wrong answers")
        doubted = _doubted(TEST, self._test, self._decoded) + _doubted(TRAIN, some, learnt)
        return sorted(doubted, key=lambda row: -row["confidence"])


def _texts(examples: Examples, most: int | None = None) -> list[str]:
    """All, or at most so many, evenly spaced."""
    rows = np.linspace(0, len(examples) - 1, min(most or len(examples), len(examples))).astype(int)
    return [examples.text(int(i)) for i in rows]


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


def _doubted(split: str, examples: Examples, decoded: Decoded) -> list[dict[str, Any]]:
    """The suspects of a split."""
    compiled, answers = examples.compiled, parse_all(examples.compiled, decoded.tokens)
    truth, gold = teacher_answers(examples), gold_answers(examples)
    found = suspects(compiled.task, _texts(examples), gold, truth, answers, decoded.confidence)
    return [{"split": split} | row for row in found]


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


def _decode_all(
    decode: Callable[[Prefixes], Decoded], examples: Examples | Prefixes, size: int, what: str
) -> tuple[Decoded, float]:
    """All answers and the seconds they took."""
    parts, started = [], time.perf_counter()
    with progress(what, len(examples)) as (bar, task):
        for start in range(0, len(examples), size):
            rows = range(start, min(start + size, len(examples)))
            parts.append(decode([examples.prefix(i) if isinstance(examples, Examples) else examples[i] for i in rows]))
            bar.update(task, completed=start + size)
    seconds = time.perf_counter() - started
    tokens = [answer for part in parts for answer in part.tokens]
    return Decoded(tokens, np.concatenate([p.by_field for p in parts]), sum(p.calls for p in parts)), seconds


def _batches(examples: Examples, size: int) -> Iterator[Batch]:
    order = np.arange(len(examples))
    return (examples.batch(order[start : start + size]) for start in range(0, len(order), size))


def _sizes(model: Student, shards: Shards) -> dict[str, Any]:
    counts = model.parameter_counts()
    return {"student": sum(counts.values()), "student_parts": counts, "teacher": shards.manifest.teacher.parameters}


def _speed(shards: Shards, decoded: Decoded, seconds: float) -> dict[str, Any]:
    """Answers a second, each as measured where it ran: the teacher during extraction, the student just now.

    The teacher's is None where it gave no answers, only scored them, or where the shards do not say: they came from JSON lines.
    """
    rows, took = shards.manifest.rows, shards.manifest.teacher_seconds
    teacher = rows / took if took and shards.manifest.answers == "teacher" else None
    student, spent = len(decoded.tokens) / seconds, shards.manifest.teacher.spent
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() or "CPU"
    return {
        "teacher_answers_per_second": teacher,
        "student_answers_per_second": student,
        "ratio": student / teacher if teacher else None,
        "teacher_million_cost": None if spent is None or spent.cost is None else 1e6 * spent.cost / rows,
        "student_million_seconds": 1e6 / student,
        "student_device": f"{device}, {torch.get_num_threads()} threads",
        "student_batches": decoded.calls,
    }
