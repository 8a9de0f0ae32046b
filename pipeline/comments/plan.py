"""The plan: comments that pass the filters, cut into numbered units of N rows before any teacher starts.

Each unit is a Parquet file of its own, so a unit can be run, and run again, without the others. `plan.json` is written
last; without it the folder holds no plan and is filled anew.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from pipeline.base import storage
from pipeline.base.config import Strict
from pipeline.base.errors import UserError
from pipeline.comments.reading import DROPS, KEPT, MALFORMED, SCHEMA, Columns, file_format, read_file
from pipeline.config import CommentsConfig
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer

log = logging.getLogger(__name__)

MANY_DROPPED = 0.05  # share of the rows read: a rule that drops more may be a mistake
SAMPLED, SAMPLED_CHARACTERS = 2048, 20_000  # comments, and of each, whose lengths are looked at for advice
FINGERPRINTS = 16  # files looked at together: in a bucket each takes some requests
UNIT_COLUMNS = ["file", "row", "id", "text", "tokens", "answer", "shares", "gold"]


class CommentSource(Strict):
    """What a plan was made from. Another source needs another folder."""

    task: str
    tokenizer: str
    files: list[tuple[str, str]] = Field(..., description="path and fingerprint of the content")
    text: str = Field(..., description="its column, or the name of the joined text where the task has an input of several")
    id: str
    answer: str | None
    gold: str | None = None
    probabilities: str | None = None
    limit: int | None
    rows_per_unit: int

    @property
    def paths(self) -> list[str]:
        """The files."""
        return [path for path, _ in self.files]

    def columns(self, task: Task) -> Columns:
        """What is read of them."""
        return Columns(self.text, self.id, self.answer, self.gold, self.probabilities, task)


class Plan(Strict):
    """The units and what became of every input row."""

    source: CommentSource
    units: int
    read: int = Field(..., description="rows read; with a limit, reading stops when it is reached")
    kept: int
    malformed: int
    dropped: dict[str, int]

    def summary(self) -> str:
        """One line for people."""
        drops = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.dropped.items() if count)
        return f"{self.read:,} rows read, {self.kept:,} kept, {self.malformed:,} malformed, dropped: {drops or 'none'}"


def find_comments(config: CommentsConfig, task: Task | None = None) -> list[str]:
    """The files to read, absolute, sorted within each path given.

    Raises:
        UserError: none is given, one is missing or of an unknown format, all are empty, or the text column is not there.
    """
    if not config.paths:
        raise UserError("no comments given: name files with --comments")
    paths = [storage.absolute(path) for pattern in config.paths for path in storage.expand(pattern)]
    for path in paths:
        file_format(path)
    if not any(storage.size(path) for path in paths):
        raise UserError(f"{paths[0]} is empty" if len(paths) == 1 else f"all {len(paths)} files of comments are empty")
    next(read_file(paths[0], Columns.of(config, task)), None)  # a wrong column is better found before Ray starts
    return list(dict.fromkeys(paths))


def describe_source(
    config: CommentsConfig, paths: list[str], task: Task, tokenizer: TextTokenizer, rows_per_unit: int
) -> CommentSource:
    """The identity of the input.

    Raises:
        UserError: its columns of answers are not the task's fields.
    """
    Columns.of(config).require_fields(task)
    with ThreadPoolExecutor(FINGERPRINTS) as threads:
        fingerprints = list(threads.map(storage.fingerprint, paths))
    return CommentSource(
        task=task.hash,
        tokenizer=tokenizer.hash,
        files=list(zip(paths, fingerprints, strict=True)),
        text="text" if task.input else config.text,
        id=config.id,
        answer=config.answer,
        gold=config.gold,
        probabilities=config.probabilities,
        limit=config.limit,
        rows_per_unit=rows_per_unit,
    )


def find_plan(folder: str, source: CommentSource) -> Plan | None:
    """The plan a folder holds, if any.

    Raises:
        UserError: it was made from another source, and the message names what differs, or by a version with other plans.
    """
    path = storage.join(folder, "plan.json")
    if not storage.exists(path):
        return None
    try:
        plan = Plan.model_validate(storage.read_json(path))
    except ValidationError as error:
        raise UserError(f"{path} is no plan of this version of Retort: choose another --out, or delete {folder}") from error
    differ = [name for name, value in source if getattr(plan.source, name) != value]
    if differ:
        raise UserError(f"{folder} holds another run (its {', '.join(differ)} differ): choose another --out, or delete it")
    return plan


def make_plan(
    folder: str, source: CommentSource, config: CommentsConfig, tables: Iterable[pa.Table], every: bool = False
) -> Plan:
    """Cuts comments that were read and filtered.

    Args:
        tables: with the columns of `SCHEMA`, as `comment_batches` and `comment_tables` give them.
        every: set aside every row that takes no part, not only malformed ones; the filters may drop all of them.

    Raises:
        UserError: no comment passes the filters, or more are malformed than allowed.
    """
    writer = _UnitWriter(folder, source.rows_per_unit, source.limit)
    with storage.writing(storage.join(folder, "set_aside.jsonl")) as set_aside:
        malformed, first = 0, None
        for table in tables:
            records = _set_aside(table, source.paths, every)
            first = first or next(iter(records), None)
            malformed += pa.compute.sum(pa.compute.equal(table["status"], MALFORMED)).as_py() or 0
            if config.max_malformed is not None and malformed > config.max_malformed:
                raise UserError(
                    f"more than {config.max_malformed} malformed rows (comments.max_malformed); the last: {records[-1]}"
                )
            set_aside.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
            if not writer.add(table):
                break
        writer.flush()
    plan = writer.plan(source)
    if not plan.kept and (not every or plan.malformed == plan.read):
        raise UserError(
            f"no comment passed the filters: {plan.summary()}" + (f"; the first set aside: {first}" if first else "")
        )
    storage.write_json(storage.join(folder, "plan.json"), plan.model_dump(mode="json"))
    return plan


def dropped_too_many(plan: Plan, task: Task, tokenizer: TextTokenizer) -> list[str]:
    """What to change in the task, for each of its rules that drops more comments than most people would want."""
    rules = task.comments
    advice = {
        "too_long": f"have more tokens than comments.max_tokens ({rules.max_tokens})",
        "too_short": f"have fewer tokens than comments.min_tokens ({rules.min_tokens})",
        "urls": "hold a URL; comments.urls: true in the task keeps them",
        "special_tokens": "hold the text of a control token; comments.special_tokens: true in the task keeps them",
    }
    many = {name: count for name, count in plan.dropped.items() if count > MANY_DROPPED * plan.read}
    lines = [f"{count:,} of {plan.read:,} comments are left out: they {advice[name]}" for name, count in many.items()]
    return lines + ([_propose_length(plan.source, task, tokenizer)] if "too_long" in many else [])


def _propose_length(source: CommentSource, task: Task, tokenizer: TextTokenizer) -> str:
    """The `max_tokens` that would keep nearly all comments, by the first of them."""
    rows = itertools.islice(read_file(source.paths[0], source.columns(task)), SAMPLED)
    lengths = sorted(map(len, tokenizer.encode([row.text[:SAMPLED_CHARACTERS] for row in rows if row.status == KEPT])))
    return f"max_tokens: {lengths[99 * (len(lengths) - 1) // 100]} would keep 99 in 100 of the first {len(lengths):,} comments"


def _set_aside(table: pa.Table, paths: list[str], every: bool) -> list[dict[str, Any]]:
    """Malformed rows with their reasons; if asked, also the rows that the filters drop."""
    apart = pa.compute.not_equal(table["status"], KEPT) if every else pa.compute.equal(table["status"], MALFORMED)
    rows = table.filter(apart).select(["file", "row", "id", "status", "reason"]).to_pylist()
    return [
        {"file": paths[row["file"]], "line": row["row"] + 1, "id": row["id"], "reason": row["reason"] or row["status"]}
        for row in rows
    ]


class _UnitWriter:
    """Collects kept rows and writes a unit whenever one is full."""

    def __init__(self, folder: str, rows_per_unit: int, limit: int | None) -> None:
        self._folder, self._size, self._limit = folder, rows_per_unit, limit
        self._waiting = SCHEMA.empty_table()
        self._counts: Counter[str] = Counter()
        self._units = 0

    def add(self, table: pa.Table) -> bool:
        """Takes the next rows in order; false once the limit is reached."""
        table = self._until_limit(table)
        counts = pa.compute.value_counts(table["status"]).to_pylist()
        self._counts.update({count["values"]: count["counts"] for count in counts})
        kept = table.filter(pa.compute.equal(table["status"], KEPT))
        self._waiting = pa.concat_tables([self._waiting, kept]).combine_chunks()
        while len(self._waiting) >= self._size:
            self._write(self._waiting[: self._size])
            self._waiting = self._waiting[self._size :]
        return self._limit is None or self._counts[KEPT] < self._limit

    def _until_limit(self, table: pa.Table) -> pa.Table:
        if self._limit is None:
            return table
        kept = pa.compute.cumulative_sum(pa.compute.equal(table["status"], KEPT).cast(pa.int64()))
        room = self._limit - self._counts[KEPT]
        end = pa.compute.index(kept, room).as_py()
        return table if end < 0 else table[: end + 1]

    def flush(self) -> None:
        """Writes the last, shorter unit."""
        if len(self._waiting):
            self._write(self._waiting)

    def _write(self, rows: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(rows.select(UNIT_COLUMNS), buffer, compression="zstd")
        storage.write_bytes(unit_path(self._folder, self._units), buffer.getbuffer())
        self._units += 1

    def plan(self, source: CommentSource) -> Plan:
        return Plan(
            source=source,
            units=self._units,
            read=self._counts.total(),
            kept=self._counts[KEPT],
            malformed=self._counts[MALFORMED],
            dropped={name: self._counts[name] for name in DROPS},
        )


def unit_path(folder: str, unit: int) -> str:
    """Where a unit's comments are."""
    return storage.join(folder, f"unit-{unit:06d}.parquet")


def read_unit(folder: str, unit: int) -> pa.Table:
    """The comments of a unit, with the columns of `UNIT_COLUMNS`."""
    return pq.read_table(pa.BufferReader(storage.read_bytes(unit_path(folder, unit))))
