"""Logit shards: one Parquet file a unit, beside a manifest and the compiled task they were made under.

Logits are stored as log-probabilities under the full vocabulary (raw logit minus the log-sum-exp at T = 1), since float16
is finest near zero, where the probability is; the raw logit is that plus the stored log-sum-exp.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.capture import TEMPERATURES, Captured
from pipeline.compiled import CompiledTask, require_same
from pipeline.errors import UserError

log = logging.getLogger(__name__)

FORMAT_VERSION = 2

# T steps of an answer, C of them with their logits, W watched tokens, K temperatures
SCHEMA = pa.schema(
    [
        pa.field("file", pa.int32()),  # with `row` and `sample`, the example's key: index in the manifest's list of files
        pa.field("row", pa.int64()),  # from 0 within the file
        pa.field("sample", pa.int32()),  # from 0 among the answers to one comment
        pa.field("id", pa.string()),  # the comment's own id, "" where it has none
        pa.field("text", pa.string()),  # the comment
        pa.field("comment_tokens", pa.list_(pa.int32())),  # the comment in the teacher's tokens
        pa.field("answer_tokens", pa.list_(pa.int32())),  # [T], the teacher's answer, end token last
        pa.field("kept", pa.list_(pa.bool_())),  # [T], the steps whose logits are here
        pa.field("logprobs", pa.list_(pa.float16())),  # [C × W], nats: raw logit − log-sum-exp of the full vocabulary
        pa.field("lse", pa.list_(pa.float32())),  # [C × K], nats: log-sum-exp of raw logits / T for each of TEMPERATURES
    ]
)
METADATA = b"retort"
ROW_COLUMNS = ["file", "row", "sample", "id", "text", "tokens"]


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
    folder: str, unit: int, rows: pa.Table, captured: Captured, about: dict[str, Any], set_aside: Sequence[dict[str, Any]] = ()
) -> int:
    """Commits one unit in one write: its examples, and in the same file the rows that could not become one.

    Args:
        folder: of the shards.
        unit: the unit's number.
        rows: the examples' comments, with the columns `ROW_COLUMNS`.
        captured: the teacher's answers to them, in the same order.
        about: JSON-able facts kept in the file itself: hashes, teacher, seconds.
        set_aside: file, row, sample, id and reason of each row of the unit that is no example.

    Returns:
        Size of the file in bytes.
    """
    inside, kept = np.arange(captured.tokens.shape[1]) < captured.lengths[:, None], captured.kept
    logprobs = (captured.logits - captured.lse[..., :1])[kept].astype(np.float16)
    counts = kept.sum(1)
    sizes = {"watched": captured.logits.shape[2], "steps": int(inside.sum()), "kept_steps": int(kept.sum())}
    facts = about | sizes | {"set_aside": list(set_aside)}
    table = pa.table(
        [
            *(rows[name] for name in ROW_COLUMNS),
            _lists(captured.tokens[inside], captured.lengths, pa.int32()),
            _lists(kept[inside], captured.lengths, pa.bool_()),
            _lists(logprobs.reshape(-1), counts * logprobs.shape[1], pa.float16()),
            _lists(captured.lse[kept].reshape(-1), counts * len(TEMPERATURES), pa.float32()),
        ],
        schema=SCHEMA.with_metadata({METADATA: json.dumps(facts)}),
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=1, use_dictionary=False)
    storage.write_bytes(shard_path(folder, unit), buffer.getbuffer())
    return buffer.tell()


def _lists(values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


@dataclass(frozen=True)
class ShardTable:
    """One shard in memory. N examples, M steps of all of them together, C of these with their logits.

    Attributes:
        keys: int64 [N, 3]: file, row and sample.
        ids: the comments' own ids.
        texts: the comments.
        comments: each comment's tokens, int32.
        answers: int32 [M], answers one after another, each with its end token.
        lengths: int64 [N], steps of each answer.
        kept: bool [M], the steps whose logits are here.
        logprobs: float16 [C, W], see `SCHEMA`.
        lse: float32 [C, K].
    """

    keys: np.ndarray[Any, np.dtype[np.int64]]
    ids: list[str]
    texts: list[str]
    comments: list[np.ndarray[Any, np.dtype[np.int32]]]
    answers: np.ndarray[Any, np.dtype[np.int32]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    kept: np.ndarray[Any, np.dtype[np.bool_]]
    logprobs: np.ndarray[Any, np.dtype[np.float16]]
    lse: np.ndarray[Any, np.dtype[np.float32]]


def read_shard(path: str) -> ShardTable:
    """Reads one shard."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
    column = {name: table[name].combine_chunks() for name in table.column_names}
    kept = column["kept"].flatten().to_numpy(zero_copy_only=False)
    answers, logprobs, lse = (column[name].flatten().to_numpy() for name in ("answer_tokens", "logprobs", "lse"))
    comments = column["comment_tokens"]
    return ShardTable(
        keys=np.stack([column[name].to_numpy().astype(np.int64) for name in ("file", "row", "sample")], axis=1),
        ids=table["id"].to_pylist(),
        texts=table["text"].to_pylist(),
        comments=np.split(comments.flatten().to_numpy(), comments.offsets.to_numpy()[1:-1]) if len(table) else [],
        answers=answers,
        lengths=np.diff(column["answer_tokens"].offsets.to_numpy()).astype(np.int64),
        kept=kept,
        logprobs=logprobs.reshape(-1, json.loads(table.schema.metadata[METADATA])["watched"]),
        lse=lse.reshape(-1, len(TEMPERATURES)),
    )


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself, without its rows."""

    unit: int
    rows: int
    bytes: int
    facts: dict[str, Any]


def read_footer(folder: str, unit: int) -> Footer:
    """Reads the end of a shard alone."""
    fs, inner = storage.filesystem(shard_path(folder, unit))
    with fs.open_input_file(inner) as stream:
        footer, size = pq.read_metadata(stream), stream.size()
    facts = json.loads(footer.schema.to_arrow_schema().metadata[METADATA])
    return Footer(unit, footer.num_rows, size, facts)


@dataclass(frozen=True)
class Shards:
    """A folder of shards that belong together."""

    folder: str
    manifest: dict[str, Any]
    compiled: CompiledTask

    def tables(self) -> Iterator[ShardTable]:
        """Every shard with examples, one at a time, in order."""
        tables = (read_shard(shard_path(self.folder, unit)) for unit in range(self.manifest["units"]))
        return (table for table in tables if len(table.keys))


def write_manifest(folder: str, units: int, about: dict[str, Any]) -> dict[str, Any]:
    """Derives the manifest, and set_aside.jsonl beside it, from the committed shards.

    Args:
        folder: of the shards.
        units: how many the plan has.
        about: facts of the whole extraction: hashes, teacher, counts, versions, `files` the comments came from.

    Raises:
        UserError: a unit is missing, or a shard was made under other hashes.
    """
    missing = sorted(set(range(units)) - set(committed_units(folder)))
    if missing:
        raise UserError(f"{len(missing)} of {units} units have no shard in {folder}, the first {missing[0]}: run again")
    totals = {"units": units, "rows": 0, "set_aside": 0, "steps": 0, "kept_steps": 0, "bytes": 0, "teacher_seconds": 0.0}
    with storage.writing(storage.join(folder, "set_aside.jsonl")) as lines:
        for unit in range(units):
            footer = read_footer(folder, unit)
            require_same(footer.facts["hashes"], about["hashes"], shard_path(folder, unit), "the manifest")
            _add(totals, footer)
            for record in footer.facts["set_aside"]:
                lines.write(json.dumps(_place(record, about["files"]), ensure_ascii=False).encode() + b"\n")
    manifest = {"format_version": FORMAT_VERSION} | about | totals
    storage.write_json(storage.join(folder, "manifest.json"), manifest)
    return manifest


def _add(totals: dict[str, Any], footer: Footer) -> None:
    totals["rows"] += footer.rows
    totals["set_aside"] += len(footer.facts["set_aside"])
    totals["bytes"] += footer.bytes
    totals["teacher_seconds"] += footer.facts["seconds"]
    for name in ("steps", "kept_steps"):
        totals[name] += footer.facts[name]


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
    manifest = storage.read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format {manifest.get('format_version')}, this Retort reads {FORMAT_VERSION}")
    compiled = CompiledTask.load(folder)
    require_same(manifest["hashes"], compiled.hashes, path, "the compiled task beside it")
    return Shards(folder, manifest, compiled)
