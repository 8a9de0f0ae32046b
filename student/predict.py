"""`retort predict`: comments through a student to answers, one JSON line each. Neither Ray nor the teacher is needed."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from pipeline import storage
from pipeline.comments import KEPT, Columns, Row, filter_rows, read_file
from pipeline.config import CommentsConfig
from pipeline.errors import UserError
from pipeline.plan import find_comments
from student.answerer import BATCH, Answerer
from student.checkpoint import load_student

log = logging.getLogger(__name__)


def predict(config: CommentsConfig, student_folder: str, out: str) -> Counter[str]:
    """Answers every comment that the task's filters let through.

    `out` gets one JSON line a comment: file, line, id, the comment under its column's name, answer, and the confidence
    (product of the probabilities of the choices made); `retort score` reads it as it is. `out` + `.set_aside` gets one line
    for every other row, with its reason.

    Returns:
        How many rows were answered (`kept`) and set aside, by reason.

    Raises:
        UserError: no comments, no student, or more malformed rows than allowed.
    """
    paths = find_comments(config)
    model, compiled = load_student(student_folder, "cuda" if torch.cuda.is_available() else "cpu")
    answerer, counts = Answerer(model, compiled), Counter[str]()
    with storage.writing(out) as answers, storage.writing(out + ".set_aside") as set_aside:
        for path, rows in _batches(paths, config):
            marked = filter_rows(rows, compiled.task.comments, compiled.tokenizer)
            kept = [row for row in marked if row.status == KEPT][: _room(config, counts)]
            _write(answers, _answers(path, kept, answerer, config.text))
            _write(set_aside, (_reason(path, row) for row in marked if row.status != KEPT))
            counts.update(row.status for row in marked if row.status != KEPT)
            counts[KEPT] += len(kept)
            if config.max_malformed is not None and counts["malformed"] > config.max_malformed:
                raise UserError(f"more than {config.max_malformed} malformed rows (comments.max_malformed), in {path}")
            if _room(config, counts) == 0:
                break
    log.info("answered %s comments; set aside: %s", f"{counts[KEPT]:,}", _others(counts) or "none")
    return counts


def _batches(paths: list[str], config: CommentsConfig) -> Iterator[tuple[str, list[Row]]]:
    for path in paths:
        rows = read_file(path, Columns(config.text, config.id))
        while batch := list(itertools.islice(rows, BATCH)):
            yield path, batch


def _room(config: CommentsConfig, counts: Counter[str]) -> int | None:
    return None if config.limit is None else config.limit - counts[KEPT]


def _answers(path: str, rows: list[Row], answerer: Answerer, column: str) -> Iterator[dict[str, Any]]:
    for row, answer in zip(rows, answerer.answer(rows), strict=True):
        place = {"file": path, "line": row.row + 1, "id": row.id, column: row.text}
        yield place | {"answer": answer.values, "confidence": answer.confidence}


def _reason(path: str, row: Row) -> dict[str, Any]:
    return {"file": path, "line": row.row + 1, "id": row.id, "status": row.status, "reason": row.reason}


def _write(stream: Any, records: Iterator[dict[str, Any]]) -> None:
    for record in records:
        stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _others(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in counts.items() if status != KEPT and count)
