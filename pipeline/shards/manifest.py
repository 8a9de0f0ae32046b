"""The manifest over a folder of shards: derived from the shards themselves when all of them are there."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.shards.codec import ErrorSummary
from pipeline.shards.files import AGAIN, ShardTable, committed_units, facts_of, named, read_shard, shard_path
from pipeline.shards.payload import Compact
from pipeline.task.compiled import CompiledTask, require_same
from pipeline.teacher.capture import TEMPERATURES

FORMAT_VERSION: Literal[3] = 3
THREADS = 16  # that read footers: in a bucket each takes some requests
FOOTERS = 256  # in memory at once

Count = Annotated[int, Field(ge=0)]


class _Facts(BaseModel):
    """Facts of an extraction that Retort reads; others stay as they were written."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Spent(_Facts):
    """What an API was paid: `cost` by its prices, where they were given."""

    calls: Count
    cost: Annotated[float, Field(ge=0)] | None = None


class TeacherFacts(_Facts):
    """Who answered; no model where the answers were imported."""

    model: str | None
    engine: str | None = None
    parameters: int | None = None
    spent: Spent | None = None

    @property
    def is_here(self) -> bool:
        """Whether it is a model that can be loaded, not one behind an API."""
        return self.model is not None and self.engine not in ("openai", "merged")


class _Source(_Facts):
    answer: str | None


class CommentsFacts(_Facts):
    """The plan of the units."""

    source: _Source


class CodecFacts(_Facts):
    """How the logits are stored: shards by codec, and the codec's error."""

    shards: dict[str, Count]


class Totals(_Facts):
    """What is derived from the shards; `kept_steps` are those with their logits, `bytes` those of the files."""

    units: Count
    rows: Count
    set_aside: Count = 0
    steps: Count
    kept_steps: Count
    bytes: Count = 0
    teacher_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    digest: str
    codec: CodecFacts


class About(_Facts):
    """What an extraction says of itself: the compiled task's hashes, the teacher, the files of comments and their plan."""

    task_name: str
    hashes: dict[str, str]
    teacher: TeacherFacts
    files: list[str]
    comments: CommentsFacts


class Manifest(About, Totals):
    """What manifest.json holds."""

    format_version: Literal[3] = FORMAT_VERSION

    @property
    def answers(self) -> Literal["teacher", "given"]:
        """Whose the answers are: the teacher's own, or those `retort score` was given."""
        return "teacher" if self.comments.source.answer is None else "given"


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself, without its rows."""

    unit: int
    rows: int
    bytes: int
    facts: dict[str, Any]


def read_footer(folder: str, unit: int) -> Footer:
    """Reads the end of a shard alone.

    Raises:
        UserError: it is damaged, or no shard of this unit.
    """
    path = shard_path(folder, unit)
    fs, inner = storage.regular_file(path)
    with named(path), fs.open_input_file(inner) as stream:
        footer, size = pq.read_metadata(stream), stream.size()
        schema = footer.schema.to_arrow_schema()
    facts = facts_of(path, schema)
    _require_unit(path, facts, unit)
    return Footer(unit, footer.num_rows, size, facts)


def read_footers(folder: str, units: Iterable[int]) -> Iterator[Footer]:
    """The ends of many shards in the order of the units, several read at a time and at most `FOOTERS` held.

    Raises:
        UserError: one is damaged, or no shard of its unit.
    """
    waiting = iter(units)
    with ThreadPoolExecutor(THREADS) as threads:
        while some := list(itertools.islice(waiting, FOOTERS)):
            yield from threads.map(partial(read_footer, folder), some)


def _require_unit(path: str, facts: dict[str, Any], unit: int) -> None:
    if facts.get("unit", unit) != unit:
        raise UserError(f"{path} is the shard of unit {facts['unit']}, not of {unit}. {AGAIN}")


@dataclass(frozen=True)
class Shards:
    """A folder of shards that belong together."""

    folder: str
    manifest: Manifest
    compiled: CompiledTask

    def tables(self) -> Iterator[ShardTable]:
        """Every shard with examples, one at a time, in order.

        Raises:
            UserError: one is missing, damaged, or none of those that the manifest was derived from.
        """
        compact, digest = Compact.load(self.folder, self.compiled.automaton), _digest()
        for unit in range(self.manifest.units):
            path = shard_path(self.folder, unit)
            table = read_shard(path, compact)
            _require_unit(path, table.facts, unit)
            require_same(table.facts["hashes"], self.manifest.hashes, path, "the manifest")
            if table.stored.width != self.compiled.watched.size:
                raise UserError(
                    f"{path} holds {table.stored.width} logits a step, the task watches {self.compiled.watched.size}"
                )
            digest.update(table.facts["digest"].encode())
            if len(table.keys):
                yield table
        if digest.hexdigest() != self.manifest.digest:
            raise UserError(
                f"a shard in {self.folder} is not the one that manifest.json was derived from: run `retort extract` again"
            )


def write_manifest(folder: str, units: int, about: dict[str, Any]) -> Manifest:
    """Derives the manifest, and set_aside.jsonl beside it, from the committed shards.

    Args:
        about: facts of the whole extraction: hashes, teacher, counts, versions, `files` the comments came from.

    Raises:
        UserError: a unit is missing, or a shard was made under other hashes.
    """
    missing = sorted(set(range(units)) - set(committed_units(folder)))
    if missing:
        raise UserError(f"{len(missing)} of {units} units have no shard in {folder}, the first {missing[0]}: run again")
    totals = _Totals()
    with storage.writing(storage.join(folder, "set_aside.jsonl")) as lines:
        for footer in read_footers(folder, range(units)):
            require_same(footer.facts["hashes"], about["hashes"], shard_path(folder, footer.unit), "the manifest")
            totals.add(footer)
            for record in footer.facts["set_aside"]:
                lines.write(json.dumps(_place(record, about["files"]), ensure_ascii=False).encode() + b"\n")
    manifest = Manifest.model_validate(about | {"units": units} | totals.facts())
    storage.write_json(storage.join(folder, "manifest.json"), manifest.model_dump(mode="json"))
    return manifest


def _digest() -> hashlib.blake2b:
    """Of the shards' digests, one after another: tells two extractions apart."""
    return hashlib.blake2b(digest_size=8)


class _Totals:
    """The sums over all shards."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._seconds = 0.0
        self._codecs: Counter[str] = Counter()
        self._errors: dict[str, ErrorSummary] = {}
        self._digest = _digest()

    def add(self, footer: Footer) -> None:
        facts = footer.facts
        self._sums.update(rows=footer.rows, set_aside=len(facts["set_aside"]), bytes=footer.bytes)
        self._sums.update(steps=facts["steps"], kept_steps=facts["kept_steps"])
        self._seconds += facts["seconds"]
        self._digest.update(facts["digest"].encode())
        self._codecs[facts["codec"]] += 1
        for name, content in facts.get("error", {}).items():
            error = ErrorSummary.from_json(content)
            self._errors[name] = self._errors[name].merge(error) if name in self._errors else error

    def facts(self) -> dict[str, Any]:
        errors = {f"{name}_steps": _error_facts(error) for name, error in self._errors.items()}
        codec = {"shards": dict(self._codecs), "kl": errors}
        return dict(self._sums) | {"digest": self._digest.hexdigest(), "teacher_seconds": self._seconds, "codec": codec}


def _error_facts(error: ErrorSummary) -> dict[str, Any]:
    """Nats of KL between what was captured and what the shards hold, by temperature."""
    columns = zip(TEMPERATURES, error.mean().tolist(), error.percentile(99.9).tolist(), strict=True)
    return {f"T={t}": {"mean": mean, "p99.9": tail} for t, mean, tail in columns}


def _place(record: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """A set-aside record with the row's place as people find it."""
    rest = {name: value for name, value in record.items() if name not in ("file", "row")}
    return {"file": files[record["file"]], "line": record["row"] + 1} | rest


def open_shards(folder: str) -> Shards:
    """Opens a finished extraction.

    Raises:
        UserError: there is none, it is unfinished, of another format, or its parts do not belong together.
    """
    path = storage.join(folder, "manifest.json")
    if not storage.exists(path):
        raise UserError(f"no manifest.json in {folder}: it holds no finished extraction. Run `retort extract` first")
    content = storage.read_form(path, dict[str, Any])
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format {content.get('format_version')}, this Retort reads {FORMAT_VERSION}")
    manifest = storage.in_form(path, content, Manifest)
    compiled = CompiledTask.load(folder)
    require_same(manifest.hashes, compiled.hashes, path, "the compiled task beside it")
    return Shards(folder, manifest, compiled)
