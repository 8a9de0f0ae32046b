"""Logit shards: one Parquet file a unit, beside a manifest and the compiled task they were made under.

Logits are stored as log-probabilities under the full vocabulary (raw logit minus the log-sum-exp at T = 1), since float16
is finest near zero, where the probability is; the raw logit is that plus the stored log-sum-exp.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
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

FORMAT_VERSION = 1

# T steps of an answer, W watched tokens, K temperatures
SCHEMA = pa.schema(
    [
        pa.field("file", pa.int32()),  # with `row`, the example's key: index in the manifest's list of files
        pa.field("row", pa.int64()),  # from 0 within the file
        pa.field("id", pa.string()),  # the comment's own id, "" where it has none
        pa.field("text", pa.string()),  # the comment
        pa.field("comment_tokens", pa.list_(pa.int32())),  # the comment in the teacher's tokens
        pa.field("answer_tokens", pa.list_(pa.int32())),  # [T], the teacher's answer, end token last
        pa.field("logprobs", pa.list_(pa.float16())),  # [T × W], nats: raw logit − log-sum-exp of the full vocabulary
        pa.field("lse", pa.list_(pa.float32())),  # [T × K], nats: log-sum-exp of raw logits / T for each of TEMPERATURES
    ]
)
METADATA = b"retort"


def shard_path(folder: str, unit: int) -> str:
    """Where a unit's shard is."""
    return storage.join(folder, f"shard-{unit:06d}.parquet")


def committed_units(folder: str) -> list[int]:
    """Numbers of the units whose shards exist."""
    names = (re.fullmatch(r"shard-(\d+)\.parquet", name) for name in storage.list_files(folder))
    return [int(name.group(1)) for name in names if name]


def write_shard(folder: str, unit: int, comments: pa.Table, captured: Captured, about: dict[str, Any]) -> int:
    """Commits one unit in one write.

    Args:
        folder: of the shards.
        unit: the unit's number.
        comments: its rows, with the columns of `pipeline.plan.UNIT_COLUMNS`.
        captured: the teacher's answers to them, in the same order.
        about: JSON-able facts kept in the file itself: hashes, teacher, seconds.

    Returns:
        Size of the file in bytes.
    """
    keep = np.arange(captured.tokens.shape[1]) < captured.lengths[:, None]
    logprobs = (captured.logits - captured.lse[..., :1])[keep].astype(np.float16)
    table = pa.table(
        [
            *(comments[name] for name in ("file", "row", "id", "text", "tokens")),
            _lists(captured.tokens[keep], captured.lengths, pa.int32()),
            _lists(logprobs.reshape(-1), captured.lengths * logprobs.shape[1], pa.float16()),
            _lists(captured.lse[keep].reshape(-1), captured.lengths * len(TEMPERATURES), pa.float32()),
        ],
        schema=SCHEMA.with_metadata({METADATA: json.dumps(about | {"steps": int(keep.sum())})}),
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
    """One shard in memory. N examples, M steps of all of them together.

    Attributes:
        keys: int64 [N, 2], file and row.
        ids: the comments' own ids.
        texts: the comments.
        comments: each comment's tokens, int32.
        answers: int32 [M], answers one after another, each with its end token.
        lengths: int64 [N], steps of each answer.
        logprobs: float16 [M, W], see `SCHEMA`.
        lse: float32 [M, K].
    """

    keys: np.ndarray[Any, np.dtype[np.int64]]
    ids: list[str]
    texts: list[str]
    comments: list[np.ndarray[Any, np.dtype[np.int32]]]
    answers: np.ndarray[Any, np.dtype[np.int32]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    logprobs: np.ndarray[Any, np.dtype[np.float16]]
    lse: np.ndarray[Any, np.dtype[np.float32]]


def read_shard(path: str) -> ShardTable:
    """Reads one shard."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(path))).combine_chunks()
    answers, logprobs, lse = (table[name].chunk(0).flatten().to_numpy() for name in ("answer_tokens", "logprobs", "lse"))
    comments = table["comment_tokens"].chunk(0)
    edges = comments.offsets.to_numpy()[1:-1]
    return ShardTable(
        keys=np.stack([table["file"].to_numpy(), table["row"].to_numpy()], axis=1),
        ids=table["id"].to_pylist(),
        texts=table["text"].to_pylist(),
        comments=np.split(comments.flatten().to_numpy(), edges),
        answers=answers,
        lengths=np.diff(table["answer_tokens"].chunk(0).offsets.to_numpy()),
        logprobs=logprobs.reshape(len(answers), -1),
        lse=lse.reshape(len(answers), -1),
    )


@dataclass(frozen=True)
class Shards:
    """A folder of shards that belong together."""

    folder: str
    manifest: dict[str, Any]
    compiled: CompiledTask

    def tables(self) -> Iterator[ShardTable]:
        """Every shard, one at a time, in order."""
        return (read_shard(shard_path(self.folder, unit)) for unit in range(self.manifest["units"]))


def write_manifest(folder: str, units: int, about: dict[str, Any]) -> dict[str, Any]:
    """Derives the manifest from the committed shards.

    Args:
        folder: of the shards.
        units: how many the plan has.
        about: facts of the whole extraction: hashes, teacher, counts, versions.

    Raises:
        UserError: a unit is missing, or a shard was made under other hashes.
    """
    missing = sorted(set(range(units)) - set(committed_units(folder)))
    if missing:
        raise UserError(f"{len(missing)} of {units} units have no shard in {folder}, the first {missing[0]}: run again")
    totals = {"units": units, "rows": 0, "steps": 0, "bytes": 0, "teacher_seconds": 0.0}
    for unit in range(units):
        path = shard_path(folder, unit)
        fs, inner = storage.filesystem(path)
        with fs.open_input_file(inner) as stream:
            footer, size = pq.read_metadata(stream), stream.size()
        facts = json.loads(footer.schema.to_arrow_schema().metadata[METADATA])
        require_same(facts["hashes"], about["hashes"], path, "the manifest")
        totals["rows"] += footer.num_rows
        totals["steps"] += facts["steps"]
        totals["bytes"] += size
        totals["teacher_seconds"] += facts["seconds"]
    manifest = {"format_version": FORMAT_VERSION} | about | totals
    storage.write_json(storage.join(folder, "manifest.json"), manifest)
    return manifest


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
