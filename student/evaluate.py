"""`retort evaluate`: the fidelity of a student on the test split, as `fidelity.json` and one self-contained HTML page."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException

from pipeline import storage
from pipeline.compiled import CompiledTask, require_same
from pipeline.config import EvaluateConfig
from pipeline.console import progress
from pipeline.errors import UserError
from pipeline.manifest import Shards, open_shards
from pipeline.task import Values
from student.checkpoint import load_student
from student.decode import Decoded, Decoder
from student.examples import Batch, Examples, open_examples
from student.fidelity import agreement, step_measures
from student.floors import majority, tfidf_regression
from student.model import Student
from student.report import render
from student.unpack import TEST, TRAIN
from tune.tracking import Tracking

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, shards_folder: str, student_folder: str, report_folder: str) -> dict[str, Any]:
    """Measures a student against its teacher and writes the report; returns what fidelity.json holds.

    Raises:
        UserError: student and shards do not fit, or the test split is empty.
    """
    shards = open_shards(shards_folder)
    model, compiled = load_student(student_folder, "cuda" if torch.cuda.is_available() else "cpu")
    require_same(compiled.hashes, shards.compiled.hashes, student_folder, shards_folder)
    test = open_examples(shards, TEST, model.shape.sequence).first(config.limit)
    log.info("evaluating on %s test comments", f"{len(test):,}")
    texts, teacher = _texts_and_answers(test)
    if any(answer is None for answer in teacher):
        raise UserError(f"{shards_folder} holds teacher answers that do not fit its own task")
    truth = [answer for answer in teacher if answer is not None]
    constrained, seconds = _decode_all(model, compiled, test, config.batch_size, free=False)
    free, _ = _decode_all(model, compiled, test, config.batch_size, free=True)
    known, answers = _texts_and_answers(open_examples(shards, TRAIN, model.shape.sequence))
    train = [answer for answer in answers if answer is not None]
    log.info("fitting the floors on %s training comments", f"{len(train):,}")
    task = compiled.task
    figures = {
        "task": task.name,
        "examples": {"test": len(test), "train": len(train)},
        "student": agreement(task, truth, parse_all(compiled, constrained.tokens)),
        "unconstrained": agreement(task, truth, parse_all(compiled, free.tokens)),
        "floors": {
            "majority": agreement(task, truth, list(majority(train, len(test)))),
            "tfidf_regression": agreement(task, truth, list(tfidf_regression(known, train, texts))),
        },
        "steps": step_measures(model, _batches(test, config.batch_size)),
        "sizes": _sizes(model, shards),
        "speed": _speed(shards, len(test), seconds, constrained.calls),
        "training": storage.read_json(storage.join(student_folder, "train.json")),
    }
    storage.write_json(storage.join(report_folder, "fidelity.json"), figures)
    storage.write_text(storage.join(report_folder, "fidelity.html"), render(figures))
    track(figures)
    return figures


def track(figures: dict[str, Any]) -> None:
    """Puts the headline figures beside the training's metrics in MLflow, where its run can be reached."""
    agreements = {name: figures[name] for name in ("student", "unconstrained")} | figures["floors"]
    rows = {f"fidelity.{name}.{key}": row[key] for name, row in agreements.items() for key in ("valid", "whole")}
    rows |= {f"fidelity.student.{field}": share for field, share in figures["student"]["fields"].items()}
    rows |= {f"fidelity.{name}": figures["steps"][name] for name in ("accuracy", "choice_accuracy", "kl", "choice_kl")}
    rows["fidelity.ece"] = figures["steps"]["calibration"]["ece"]
    run = figures["training"]["mlflow"]
    try:
        Tracking(run["uri"], run["run"]).log([(0, rows)])
    except MlflowException as error:
        log.warning("the figures are not in MLflow: its run at %s cannot be reached (%s)", run["uri"], error)


def _texts_and_answers(examples: Examples) -> tuple[list[str], list[Values | None]]:
    """The comments and the teacher's answers to them."""
    rows = range(len(examples))
    answers = parse_all(examples.compiled, [examples.answer(i).tolist() for i in rows])
    return [examples.text(i) for i in rows], answers


def parse_all(compiled: CompiledTask, answers: list[list[int]]) -> list[Values | None]:
    """The values of each answer's tokens; None where they are not a valid answer."""
    known: dict[tuple[int, ...], Values | None] = {}  # answers are many, different ones few
    for answer in map(tuple, answers):
        if answer not in known:
            ended = answer[-1:] == (compiled.tokenizer.end_id,)
            known[answer] = compiled.task.parse(compiled.tokenizer.decode(list(answer))) if ended else None
    return [known[tuple(answer)] for answer in answers]


def _decode_all(model: Student, compiled: CompiledTask, examples: Examples, size: int, free: bool) -> tuple[Decoded, float]:
    """All answers and the seconds they took."""
    decoder = Decoder(model, compiled)
    decode = decoder.free if free else decoder.constrained
    parts, started = [], time.perf_counter()
    with progress("decoding freely" if free else "decoding", len(examples)) as (bar, task):
        for start in range(0, len(examples), size):
            rows = range(start, min(start + size, len(examples)))
            parts.append(decode([examples.prefix(i) for i in rows]))
            bar.update(task, completed=start + size)
    seconds = time.perf_counter() - started
    tokens = [answer for part in parts for answer in part.tokens]
    return Decoded(tokens, np.concatenate([p.confidence for p in parts]), sum(p.calls for p in parts)), seconds


def _batches(examples: Examples, size: int) -> Iterator[Batch]:
    order = np.arange(len(examples))
    return (examples.batch(order[start : start + size]) for start in range(0, len(order), size))


def _sizes(model: Student, shards: Shards) -> dict[str, Any]:
    counts = model.parameter_counts()
    return {"student": sum(counts.values()), "student_parts": counts, "teacher": shards.manifest["teacher"]["parameters"]}


def _speed(shards: Shards, examples: int, seconds: float, calls: int) -> dict[str, Any]:
    """Answers a second, each as measured where it ran: the teacher during extraction, the student just now."""
    teacher = shards.manifest["rows"] / shards.manifest["teacher_seconds"]
    student = examples / seconds
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() or "CPU"
    return {
        "teacher_answers_per_second": teacher,
        "student_answers_per_second": student,
        "ratio": student / teacher,
        "student_device": f"{device}, {torch.get_num_threads()} threads",
        "student_batches": calls,
    }
