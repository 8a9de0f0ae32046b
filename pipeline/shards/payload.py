"""The columns of a shard that hold its logits: float16, which loses nothing that matters, or the codec's few bytes.

C steps with their logits, of N answers; W watched tokens, K temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import DTypeLike, NDArray

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.shards.codec import Codec, ErrorSummary, divergence, pack_lse, unpack_lse, within_target
from pipeline.task.automaton import Automaton
from pipeline.teacher.capture import TEMPERATURES

FLOAT16 = [
    pa.field("logprobs", pa.list_(pa.float16())),  # [C × W], nats: raw logit − log-sum-exp of the full vocabulary
    pa.field("lse", pa.list_(pa.float32())),  # [C × K], nats: log-sum-exp of raw logits / T for each of TEMPERATURES
]
COMPACT = [  # bytes, as Parquet has no whole number under 32 bits
    pa.field("codes", pa.binary()),  # int8 [C × codes], see `pipeline.shards.codec.Codec`
    pa.field("packed_lse", pa.binary()),  # int16 [C × K], see `pipeline.shards.codec.pack_lse`
]
CODEC_FILE = "codec.safetensors"
ERROR_SAMPLE = 1024  # of all of a shard's steps, to measure the codec's error on; choice steps are measured each


@dataclass(frozen=True)
class Payload:
    """The columns of one shard.

    Attributes:
        fields: their names and types.
        columns: a value an answer each.
        facts: what the file says of them.
    """

    fields: list[pa.Field]
    columns: list[pa.Array]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Compact:
    """The codec of an extraction, and the automaton whose states it goes by."""

    codec: Codec
    automaton: Automaton

    @staticmethod
    def load(folder: str, automaton: Automaton) -> Compact | None:
        """The codec beside some shards, if they were made with one.

        Raises:
            UserError: it is damaged, or another task's.
        """
        path = storage.join(folder, CODEC_FILE)
        if not storage.exists(path):
            return None
        codec = Codec.load(path)
        if len(codec.means_SW) != automaton.states:
            raise UserError(f"{path} is of {len(codec.means_SW)} states, the automaton beside it of {automaton.states}")
        return Compact(codec, automaton)

    def errors(self, logprobs_CW: NDArray[np.float32], codes: NDArray[np.int8], states: NDArray[np.int64]) -> dict[str, Any]:
        """What decoding errs by: at every choice step, and at an even sample of all steps."""
        choices = np.flatnonzero(~self.automaton.forced[states])
        sample = np.unique(np.linspace(0, len(states) - 1, ERROR_SAMPLE).astype(int))
        groups = {"choice": choices, "all": sample}
        decoded = {name: self.codec.decode(codes[at], states[at]) for name, at in groups.items()}
        return {name: ErrorSummary.of(divergence(logprobs_CW[at], decoded[name])) for name, at in groups.items()}


def encode(
    logprobs_CW: NDArray[np.float32],
    lse_CK: NDArray[np.float32],
    counts: NDArray[np.int64],
    states: NDArray[np.int64] | None,
    compact: Compact | None,
) -> Payload:
    """The columns of a shard: compact where the codec's error on these very steps is within its target, else float16.

    Args:
        logprobs_CW: nats.
        lse_CK: nats.
        counts: int64 [N], how many of the C steps are each answer's.
        states: int64 [C], the automaton's state before each; only for the codec.
    """
    if compact is not None and states is not None and len(states):
        codes = compact.codec.encode(logprobs_CW, states)
        errors = compact.errors(logprobs_CW, codes, states)
        if all(within_target(error) for error in errors.values()):
            columns = [_bytes(codes, counts), _bytes(pack_lse(lse_CK), counts)]
            facts = {"codec": "compact", "error": {name: error.to_json() for name, error in errors.items()}}
            return Payload(COMPACT, columns, facts)
    columns = [
        lists(logprobs_CW.astype(np.float16).reshape(-1), counts * logprobs_CW.shape[1], pa.float16()),
        lists(lse_CK.reshape(-1), counts * len(TEMPERATURES), pa.float32()),
    ]
    return Payload(FLOAT16, columns, {"codec": "float16"})


@dataclass(frozen=True)
class Stored:
    """Logits as they are stored; any selection of their C steps is decoded at the cost of those steps.

    Attributes:
        values: float16 [C, W], log-probabilities in nats, or the codec's int8 [C, columns].
        lse: float32 [C, K], log-sum-exps in nats.
        codec: what the values are written in; None for float16.
    """

    values: NDArray[Any]
    lse: NDArray[np.float32]
    codec: Codec | None

    @property
    def width(self) -> int:
        """W, the watched tokens."""
        return self.values.shape[1] if self.codec is None else self.codec.decoder_CW.shape[1]

    def logprobs(self, at: NDArray[np.int64] | slice, states: NDArray[np.int64] | None) -> NDArray[np.float16]:
        """Log-probabilities of some steps, [·, W].

        Args:
            states: the automaton's state before each of these; only for the codec.
        """
        values = self.values[at]
        return values if self.codec is None or states is None else self.codec.decode(values, states).astype(np.float16)


def stored_in(column: dict[str, pa.Array], watched: int, counts: NDArray[np.int64], compact: Compact | None) -> Stored:
    """The logits in the columns of a shard.

    Args:
        counts: int64 [N], how many of the C steps are each answer's.

    Raises:
        UserError: the columns are compact and the codec is not given.
        ValueError: an answer has more or fewer logits than steps, or they are not finite.
    """
    if "codes" not in column:
        logprobs = _table(column["logprobs"], np.float16, counts, watched)
        lse = _table(column["lse"], np.float32, counts, len(TEMPERATURES))
        if not (np.isfinite(logprobs).all() and np.isfinite(lse).all()):
            raise ValueError("its logits are not finite")
        return Stored(logprobs, lse, None)
    if compact is None:
        raise UserError(f"a compact shard cannot be read without its extraction's {CODEC_FILE}, which is not there")
    codes = _table(column["codes"], np.int8, counts, compact.codec.columns)
    packed = _table(column["packed_lse"], np.int16, counts, len(TEMPERATURES))
    return Stored(codes, unpack_lse(packed), compact.codec)


def _table(column: pa.ListArray | pa.BinaryArray, kind: DTypeLike, counts: NDArray[np.int64], width: int) -> NDArray[Any]:
    """A column's numbers, `width` for each of the C steps.

    Raises:
        ValueError: an answer has more or fewer.
    """
    binary, size = pa.types.is_binary(column.type), np.dtype(kind).itemsize
    lengths = pc.binary_length(column).to_numpy() / size if binary else np.diff(column.offsets.to_numpy())
    if not np.array_equal(lengths, counts * width):
        raise ValueError("its answers have more or fewer logits than steps")
    values = np.frombuffer(column.buffers()[2] or b"", kind) if binary else column.flatten().to_numpy()
    return values[: counts.sum() * width].reshape(-1, width)


def lists(values: NDArray[Any], lengths: NDArray[Any], kind: pa.DataType) -> pa.ListArray:
    """Values one after another as lists of these lengths."""
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths)), pa.array(values, kind))


def _bytes(values: NDArray[Any], counts: NDArray[Any]) -> pa.BinaryArray:
    """Rows of small numbers, the first `counts[0]` of them as one value, and so on."""
    values = np.ascontiguousarray(values)
    buffers = [None, pa.py_buffer(_offsets(counts * values.strides[0])), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.binary(), len(counts), buffers)


def _offsets(lengths: NDArray[Any]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
