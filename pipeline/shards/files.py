"""Logit shards: one Parquet file a unit, beside a manifest and the compiled task they were made under.

Logits are stored as log-probabilities under the full vocabulary (raw logit minus the log-sum-exp at T = 1), since float16
is finest near zero, where the probability is; the raw logit is that plus the stored log-sum-exp.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from pipeline.base import storage
from pipeline.base.errors import UserError, clip
from pipeline.shards.payload import COMPACT, FLOAT16, Compact, Stored, encode, lists, stored_in
from pipeline.teacher.capture import Captured

# T steps of an answer, C of them with their logits, W watched tokens, K temperatures
EXAMPLE = [
    pa.field("file", pa.int32()),  # with `row` and `sample`, the example's key: index in the manifest's list of files
    pa.field("row", pa.int64()),  # from 0 within the file
    pa.field("sample", pa.int32()),  # from 0 among the answers to one comment
    pa.field("id", pa.string()),  # the comment's own id, "" where it has none
    pa.field("text", pa.string()),  # the comment
    pa.field("comment_tokens", pa.list_(pa.int32())),  # the comment in the teacher's tokens
    pa.field("answer_tokens", pa.list_(pa.int32())),  # [T], the teacher's answer, end token last
    pa.field("kept", pa.list_(pa.bool_())),  # [T], the steps whose logits are here
]
GOLD = pa.field(
    "gold", pa.list_(pa.int32())
)  # people's label in the same tokens, empty where there is none; older shards have none
METADATA = b"retort"
_NONE = np.zeros(0, np.int32)
AGAIN = "Delete it, and `retort extract` makes it again"
ROW_COLUMNS = ["file", "row", "sample", "id", "text", "tokens"]


class Aside(BaseModel):
    """The place of a row that is no example."""

    file: int = Field(ge=0)
    row: int = Field(ge=0)


class Facts(BaseModel):
    """What a shard's metadata says of it, at least."""

    unit: int | None = None  # older shards do not say
    hashes: dict[str, str]
    watched: int = Field(ge=0)
    steps: int = Field(ge=0)
    kept_steps: int = Field(ge=0)
    seconds: float
    digest: str
    codec: Literal["float16", "compact"]
    set_aside: list[Aside]


def shard_path(folder: str, unit: int) -> str:
    """Where a unit's shard is."""
    return storage.join(folder, f"shard-{unit:06d}.parquet")


def shard_exists(folder: str, unit: int) -> bool:
    """Whether a unit is committed."""
    return storage.exists(shard_path(folder, unit))


def committed_units(folder: str) -> list[int]:
    """Numbers of the units whose shards exist."""
    names = (re.fullmatch(r"shard-(\d+)\.parquet", name) for name in storage.list_files(folder))
    return [int(name.group(1)) for name in names if name]


def write_shard(
    folder: str,
    unit: int,
    rows: pa.Table,
    captured: Captured,
    about: dict[str, Any],
    set_aside: Sequence[dict[str, Any]] = (),
    compact: Compact | None = None,
) -> int:
    """Commits one unit in one write: its examples, and in the same file the rows that could not become one.

    Args:
        rows: the examples' comments, with the columns `ROW_COLUMNS`.
        about: JSON-able facts kept in the file itself: hashes, teacher, seconds.
        set_aside: file, row, sample, id and reason of each row of the unit that is no example.
        compact: the codec to use, where its error on this unit is small enough; float16 otherwise.

    Returns:
        Size of the file in bytes.
    """
    inside, kept = np.arange(captured.tokens.shape[1]) < captured.lengths[:, None], captured.kept
    logprobs, answers = captured.logits[kept] - captured.lse[kept][:, :1], captured.tokens[inside]
    states = _states(answers, captured.lengths, kept[inside], compact)
    payload = encode(logprobs, captured.lse[kept], kept.sum(1), states, compact)
    sizes = {"watched": logprobs.shape[1], "steps": int(inside.sum()), "kept_steps": int(kept.sum())}
    table = pa.table(
        [
            *(rows[name] for name in ROW_COLUMNS),
            lists(answers, captured.lengths, pa.int32()),
            lists(kept[inside], captured.lengths, pa.bool_()),
            rows[GOLD.name] if GOLD.name in rows.column_names else pa.array([[]] * len(rows), GOLD.type),
            *payload.columns,
        ],
        schema=pa.schema([*EXAMPLE, GOLD, *payload.fields]),
    )
    facts = about | {"unit": unit} | sizes | payload.facts | {"set_aside": list(set_aside), "digest": _digest(table)}
    table = table.replace_schema_metadata({METADATA: json.dumps(facts)})
    buffer = io.BytesIO()
    options = {"compression_level": 1, "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, buffer, compression="zstd", **options)
    storage.write_bytes(shard_path(folder, unit), buffer.getbuffer())
    return buffer.tell()


@dataclass(frozen=True)
class ShardTable:
    """One shard in memory. N examples, M steps of all of them together, C of these with their logits.

    Attributes:
        path: where it was read from.
        facts: what its metadata says, see `Facts`.
        keys: int64 [N, 3]: file, row and sample.
        ids: the comments' own ids.
        texts: the comments.
        comments: each comment's tokens, int32.
        answers: int32 [M], answers one after another, each with its end token.
        lengths: int64 [N], steps of each answer.
        kept: bool [M], the steps whose logits are here.
        gold: people's label of each comment, int32, end token last; empty where there is none.
        stored: the logits of the kept steps.
        states: int64 [C], the automaton's state before each kept step; None where no codec asks for it.
    """

    path: str
    facts: dict[str, Any]
    keys: np.ndarray[Any, np.dtype[np.int64]]
    ids: list[str]
    texts: list[str]
    comments: list[np.ndarray[Any, np.dtype[np.int32]]]
    answers: np.ndarray[Any, np.dtype[np.int32]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    kept: np.ndarray[Any, np.dtype[np.bool_]]
    gold: list[np.ndarray[Any, np.dtype[np.int32]]]
    stored: Stored
    states: np.ndarray[Any, np.dtype[np.int64]] | None

    @cached_property
    def logprobs(self) -> np.ndarray[Any, np.dtype[np.float16]]:
        """Log-probabilities of all kept steps, float16 [C, W], nats."""
        return self.stored.logprobs(slice(None), self.states)

    @property
    def lse(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Log-sum-exps of all kept steps, float32 [C, K], nats."""
        return self.stored.lse


def read_shard(path: str, compact: Compact | None = None) -> ShardTable:
    """Reads one shard.

    Args:
        compact: the codec of its extraction, if it was written with one.

    Raises:
        UserError: there is no such file, it is damaged, or no shard.
    """
    with named(path):
        table = pq.read_table(pa.BufferReader(storage.read_bytes(path)), page_checksum_verification=True)
        table.validate(full=True)
    facts = facts_of(path, table.schema)
    _require_columns(path, table)
    column = {name: table[name].combine_chunks() for name in table.column_names}
    answers, lengths = column["answer_tokens"].flatten().to_numpy(), _lengths(column["answer_tokens"])
    kept = column["kept"].flatten().to_numpy(zero_copy_only=False)
    try:
        if not np.array_equal(_lengths(column["kept"]), lengths) or facts["steps"] != len(answers):
            raise ValueError("the answers and their steps are not equally long")
        counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths), kept, len(lengths)).astype(np.int64)
        stored, states = stored_in(column, facts["watched"], counts, compact), _states(answers, lengths, kept, compact)
    except ValueError as error:
        raise UserError(f"{path} is damaged, or another task's: {error}. {AGAIN}") from error
    return ShardTable(
        path=path,
        facts=facts,
        keys=np.stack([column[name].to_numpy().astype(np.int64) for name in ("file", "row", "sample")], axis=1),
        ids=table["id"].to_pylist(),
        texts=table["text"].to_pylist(),
        comments=_split(column["comment_tokens"].flatten().to_numpy(), _lengths(column["comment_tokens"])),
        answers=answers,
        lengths=lengths,
        kept=kept,
        gold=_split(column["gold"].flatten().to_numpy(), _lengths(column["gold"]))
        if "gold" in column
        else [_NONE] * len(lengths),
        stored=stored,
        states=states,
    )


def facts_of(path: str, schema: pa.Schema) -> dict[str, Any]:
    """What a shard's metadata says of it, see `Facts`.

    Raises:
        UserError: the file is another table, or damaged.
    """
    content = (schema.metadata or {}).get(METADATA)
    if content is None:
        raise UserError(f"{path} is a table, but not a shard that `retort extract` wrote")
    try:
        facts: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. {AGAIN}") from error
    storage.in_form(path, facts, Facts)
    return facts


def _require_columns(path: str, table: pa.Table) -> None:
    """Refuses a table with other columns than a shard's, or with nulls in them.

    Raises:
        UserError: naming a column.
    """
    wanted = pa.schema(EXAMPLE + (COMPACT if "codes" in table.column_names else FLOAT16))
    for field in wanted:
        if field.name not in table.column_names or table.schema.field(field.name).type != field.type:
            raise UserError(f"{path} is no shard, or damaged: it has no column {field.name!r} of {field.type}")
        values = table[field.name]
        if values.null_count or (pa.types.is_list(field.type) and pc.list_flatten(values).null_count):
            raise UserError(f"{path} is damaged: its column {field.name!r} holds nulls. {AGAIN}")


@contextmanager
def named(path: str) -> Iterator[None]:
    """Names the file in what Arrow raises for a damaged one.

    Raises:
        UserError: saying what to do.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged, or not Parquet: {clip(str(error), 300)}. {AGAIN}") from error


def _digest(table: pa.Table) -> str:
    """Tells two shards' contents apart."""
    digest = hashlib.blake2b(digest_size=8)
    for column in table.columns:
        for buffer in column.combine_chunks().buffers():
            digest.update(buffer or b"")
    return digest.hexdigest()


def _lengths(lists: pa.ListArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.diff(lists.offsets.to_numpy()).astype(np.int64)


def _split(values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _states(
    answers: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], kept: np.ndarray[Any, Any], compact: Compact | None
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """The automaton's state before each kept step, where a codec asks for it."""
    return compact.automaton.states_before(_split(answers, lengths))[kept] if compact else None
