"""Answers as files: a unit's, in JSON lines or Parquet, which `retort score` reads as they are."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.comments.plan import CommentSource
from pipeline.task.task import Task
from pipeline.task.values import Value
from student.decode.answerer import Answer


@dataclass(frozen=True)
class Sourced:
    """An answer that counts.

    Attributes:
        answer: the student's.
        teacher: the teacher's, which counts instead where there is one.
    """

    answer: Answer
    teacher: dict[str, Value] | None = None

    @property
    def values(self) -> dict[str, Value]:
        """By field."""
        return self.teacher or self.answer.values

    @property
    def source(self) -> str:
        """Whose answer it is."""
        return "teacher" if self.teacher else "student"


def part_name(unit: int, format_: str) -> str:
    """The name of a unit's file."""
    return f"part-{unit:06d}.{format_}"


def encode_part(format_: str, source: CommentSource, comments: pa.Table, sources: list[Sourced], task: Task) -> bytes:
    """A file with a row for each comment.

    Its columns: `file` and `line` (of the input, from 1), `id`, the comment under its column's name, `answer`,
    `confidence` (the student's), `source` (whose answer it is), and with them asked for `probabilities`, each value's share by
    field. In JSON lines an answer is an object; in Parquet its JSON text.

    Args:
        format_: `jsonl` or `parquet`.
    """
    records = [_record(source, row, answer, task) for row, answer in zip(comments.to_pylist(), sources, strict=True)]
    if format_ == "jsonl":
        return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
    nested = {"answer", "probabilities"} & records[0].keys()
    flat = [record | {name: json.dumps(record[name], ensure_ascii=False) for name in nested} for record in records]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(flat), buffer, compression="zstd")
    return buffer.getvalue()


def _record(source: CommentSource, row: dict[str, Any], sourced: Sourced, task: Task) -> dict[str, Any]:
    place = {"file": source.files[row["file"]][0], "line": row["row"] + 1, "id": row["id"], source.text: row["text"]}
    answer = sourced.answer
    record = place | {"answer": task.nested(sourced.values), "confidence": answer.confidence, "source": sourced.source}
    return record | ({"probabilities": answer.probabilities(task.fields)} if answer.value_probabilities else {})
