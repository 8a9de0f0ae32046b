"""Shards as flat arrays on a local disk, to be memory-mapped.

Shards are compressed and may lie in a bucket, so each machine that trains unpacks them once, one shard at a time, into
$RETORT_CACHE (by default ~/.cache/retort); deleting them there costs only time. A folder is a split, a file a column of it.
N examples, M steps, C steps with their logits, W watched tokens, K temperatures:

    text      uint8, the comments in UTF-8
    comment   int32, its tokens
    answer    int32 [M], end token last
    state     int32 [M], the automaton's state before each step
    kept      bool [M], the steps whose logits are here
    values    float16 [C, W], log-probabilities in nats; int8 [C, codes] where every shard is compact
    lse       float32 [C, K], nats
    gold      int32, people's label in the answer's tokens, none for most

and int64 [N + 1] each, where an example's values begin: text_starts, comment_starts, answer_starts (also for state and kept),
kept_starts (for values and lse), gold_starts and choice_starts, which counts choice steps.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.base.console import progress
from pipeline.base.errors import UserError
from pipeline.comments.reading import text_key
from pipeline.shards.files import ShardTable
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import cache_folder
from student.model.reader import Reader

log = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_TENTHS = {TRAIN: range(8), VALIDATION: range(8, 9), TEST: range(9, 10)}
TEXTS = 4096  # given to a reader at once
PIECE = 1 << 20  # ids counted at once
LAYOUT = 3  # of the columns; another number makes another cache

Columns = dict[str, NDArray[Any]]


def split_of(text: str) -> str:
    """The split of a comment, by a hash of its text without case and spacing: a repeated comment stays in one split."""
    tenth = int.from_bytes(text_key(text)[:8], "big") % 10
    return next(split for split, tenths in SPLIT_TENTHS.items() if tenth in tenths)


def unpack(shards: Shards) -> dict[str, Columns]:
    """The columns of every split, memory-mapped; unpacks the shards first if no process of this machine has yet."""
    folder = cache_of(shards)
    if not folder.exists():
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _unpack(shards, folder)
    return {split: _map(folder / split) for split in SPLIT_TENTHS}


def reader_columns(shards: Shards, split: str, columns: Columns, reader: Reader) -> Columns:
    """A reader's ids of a split's texts, under the names of the comments' tokens; made once on each machine."""
    folder = cache_of(shards) / f"{split}-{reader.identity}"
    if not folder.exists():
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _encode(columns, reader, folder)
    return _map(folder)


def _encode(columns: Columns, reader: Reader, folder: Path) -> None:
    """Texts in a reader's ids, to a folder that appears when it is whole."""
    temporary, starts = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".texts-")), columns["text_starts"]
    try:
        with _Writer(temporary / "whole") as writer, progress("reading texts", len(starts) - 1) as (bar, task):
            for first in range(0, len(starts) - 1, TEXTS):
                ends = starts[first : first + TEXTS + 1]
                texts = [columns["text"][a:b].tobytes().decode() for a, b in itertools.pairwise(ends)]
                ids = reader.encode(texts)
                group = _Group(_lengths(ids), {"comment": np.concatenate(ids)})
                writer.add({"comment_starts": group}, np.ones(len(ids), bool))
                bar.update(task, completed=first + len(ids))
        (temporary / "whole").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def token_counts(ids: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    """How often each of `size` ids is among `ids`: int64 [size]. In pieces: bincount copies what it counts to int64."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(ids), PIECE):
        counts += np.bincount(ids[start : start + PIECE], minlength=size)
    return counts


def cache_of(shards: Shards) -> Path:
    """This machine's folder for what can be made again from the shards."""
    identity = json.dumps([LAYOUT, shards.manifest.digest, shards.compiled.hashes])
    return Path(cache_folder(), "shards", hashlib.sha256(identity.encode()).hexdigest()[:16])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock of a killed one is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _unpack(shards: Shards, folder: Path) -> None:
    """All shards to one folder, which appears when it is whole."""
    for unfinished in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(unfinished)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with ExitStack() as stack, progress("unpacking shards", shards.manifest.units) as (bar, task):
            writers = {split: stack.enter_context(_Writer(temporary / split)) for split in SPLIT_TENTHS}
            for table in shards.tables():
                groups, splits = _groups(shards, table), np.array([split_of(text) for text in table.texts])
                for split, writer in writers.items():
                    writer.add(groups, splits == split)
                bar.advance(task)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    log.info("unpacked %s examples to %s (%.0f MB)", f"{shards.manifest.rows:,}", folder, size / 1e6)


@dataclass(frozen=True)
class _Group:
    """Columns with equally many values of each example: `lengths` [N] of them, one after another."""

    lengths: NDArray[np.int64]
    columns: Columns


def _groups(shards: Shards, table: ShardTable) -> dict[str, _Group]:
    """One shard's columns, each group under the name of its starts.

    Raises:
        UserError: an answer is none of the task's.
    """
    automaton = shards.compiled.automaton
    texts = [text.encode() for text in table.texts]
    example = np.repeat(np.arange(len(texts)), table.lengths)
    try:
        states = automaton.states_before(np.split(table.answers, np.cumsum(table.lengths)[:-1]))
    except ValueError as error:
        raise UserError(f"{table.path} holds an answer that is none of the task: {error}") from error
    choices = np.bincount(example, ~automaton.forced[states], minlength=len(texts)).astype(np.int64)
    all_compact = set(shards.manifest.codec.shards) == {"compact"}
    values = table.stored.values if all_compact else table.logprobs
    steps = {"answer": table.answers, "state": states.astype(np.int32), "kept": table.kept}
    return {
        "text_starts": _Group(_lengths(texts), {"text": np.frombuffer(b"".join(texts), np.uint8)}),
        "comment_starts": _Group(_lengths(table.comments), {"comment": np.concatenate(table.comments)}),
        "answer_starts": _Group(table.lengths, steps),
        "kept_starts": _Group(np.bincount(example, table.kept).astype(np.int64), {"values": values, "lse": table.lse}),
        "gold_starts": _Group(_lengths(table.gold), {"gold": np.concatenate(table.gold)}),
        "choice_starts": _Group(choices, {}),
    }


def _lengths(values: list[Any]) -> NDArray[np.int64]:
    return np.array([len(value) for value in values], np.int64)


class _Writer:
    """Appends to the columns of one split; the block's end writes what `_map` needs to read them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._streams: dict[str, BinaryIO] = {}
        self._layout: dict[str, dict[str, Any]] = {}
        self._ends: dict[str, int] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()
        (self._folder / "layout.json").write_text(json.dumps(self._layout))

    def add(self, groups: dict[str, _Group], mine: NDArray[np.bool_]) -> None:
        """Appends the examples marked as mine."""
        for starts, group in groups.items():
            lengths, of_mine = group.lengths[mine], np.repeat(mine, group.lengths)
            if starts not in self._ends:
                self._append(starts, np.zeros(1, np.int64))
            end = self._ends.get(starts, 0)
            self._append(starts, end + np.cumsum(lengths))
            self._ends[starts] = end + int(lengths.sum())
            for name, values in group.columns.items():
                self._append(name, values[of_mine])

    def _append(self, name: str, values: NDArray[Any]) -> None:
        if name not in self._streams:
            self._streams[name] = (self._folder / name).open("wb")
            self._layout[name] = {"dtype": values.dtype.str, "shape": [0, *values.shape[1:]]}
        self._layout[name]["shape"][0] += len(values)
        self._streams[name].write(np.ascontiguousarray(values).data)


def _map(folder: Path) -> Columns:
    """The columns of a split.

    Raises:
        UserError: they are damaged, and may be deleted.
    """
    try:
        layout = json.loads((folder / "layout.json").read_text())
        return {name: _map_column(folder / name, **about) for name, about in layout.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged: {error}. Delete {folder.parent}, it is made again from the shards") from error


def _map_column(path: Path, dtype: str, shape: list[int]) -> NDArray[Any]:
    if shape[0] == 0:
        return np.zeros(shape, dtype)  # nothing cannot be mapped
    return np.memmap(path, dtype, "r", shape=tuple(shape))
