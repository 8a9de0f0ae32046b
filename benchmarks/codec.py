"""Ways to store logit shards: bytes a step, error and speed, each against the float16 Parquet column of plain shards.

The codec is fitted on the first shard and everything is measured on others. Sizes take in the log-sum-exps that go with the
logits, and the codec's tables spread over the steps measured. Speeds are of one thread, in MB of float16 a second, from
arrays in memory to compressed bytes and back; the best of some runs. Run with OMP_NUM_THREADS=1, so that NumPy takes one.
"""

from __future__ import annotations

import gzip
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save as save_tensors

from benchmarks.results import keep
from pipeline.shards.codec import Codec, ErrorSummary, divergence, pack_lse, unpack_lse
from pipeline.shards.files import read_shard, shard_path
from pipeline.shards.manifest import open_shards
from pipeline.teacher.capture import TEMPERATURES

TOP = 128
JSONL_EXAMPLES = 128  # a file
REPEATS = 3


@dataclass(frozen=True)
class Steps:
    """M steps of N answers: log-probabilities float16 [M, W], log-sum-exps float32 [M, K], states int64 [M]."""

    logprobs: np.ndarray
    lse: np.ndarray
    states: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Method:
    """A way to store steps: to bytes, and from bytes to log-probabilities [M, W]; `lse` stores the log-sum-exps."""

    name: str
    encode: Callable[[Steps], bytes]
    decode: Callable[[bytes, Steps], np.ndarray]
    lse: Callable[[Steps], bytes]
    tables: int = 0
    exact: bool = False
    answers: int | None = None  # at most so many are measured, where it is slow


def column(values: np.ndarray, lengths: np.ndarray) -> bytes:
    """One Parquet column with a value an example: lists, as `pipeline.shards.files` writes them, or bytes for whole numbers.

    Parquet has no integers under 32 bits: a list of int8 is stored, and compressed, as four bytes each.
    """
    width = values.shape[1] * (1 if values.dtype == np.float16 or values.dtype == np.float32 else values.itemsize)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64) * width]).astype(np.int32)
    if np.issubdtype(values.dtype, np.integer):
        array = pa.BinaryArray.from_buffers(pa.binary(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(values)])
    else:
        array = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))
    buffer = io.BytesIO()
    table = pa.table({"values": array})
    pq.write_table(table, buffer, compression="zstd", compression_level=1, use_dictionary=False)
    return buffer.getvalue()


def uncolumn(content: bytes, width: int, whole: type | None = None) -> np.ndarray:
    """The values of what `column` wrote, [M, width]; whole numbers by their type."""
    table = pq.read_table(pa.BufferReader(content), use_threads=False).combine_chunks()
    values = table["values"].chunk(0)
    if whole is not None:
        count = values.total_values_length // np.dtype(whole).itemsize
        return np.frombuffer(values.buffers()[2], whole, count).reshape(-1, width)
    return values.flatten().to_numpy().reshape(-1, width)


def top_encode(steps: Steps) -> bytes:
    """The largest log-probabilities of each step with their places, two columns."""
    at = np.argpartition(steps.logprobs.astype(np.float32), -TOP, axis=1)[:, -TOP:].astype(np.int16)
    at.sort(axis=1)
    values = np.take_along_axis(steps.logprobs, at.astype(np.int64), axis=1)
    places, rest = column(at, steps.lengths), column(values, steps.lengths)
    return len(places).to_bytes(8, "little") + places + rest


def top_decode(content: bytes, steps: Steps) -> np.ndarray:
    """What is missing shares the mass that is left over evenly, that of tokens not watched included."""
    cut = 8 + int.from_bytes(content[:8], "little")
    at, values = uncolumn(content[8:cut], TOP, np.int16).astype(np.int64), uncolumn(content[cut:], TOP).astype(np.float32)
    width = steps.logprobs.shape[1]
    left = np.maximum(1 - np.exp(values).sum(1, keepdims=True), 1e-7) / (width - TOP)
    decoded = np.repeat(np.log(left), width, axis=1)
    np.put_along_axis(decoded, at, values, axis=1)
    return decoded


def jsonl_encode(steps: Steps, compress: bool) -> bytes:
    """A line an example, its logits as decimal text."""
    rows = np.split(steps.logprobs.astype(np.float32) + steps.lse[:, :1], np.cumsum(steps.lengths)[:-1])
    text = "".join(json.dumps({"logits": row.tolist()}) + "\n" for row in rows).encode()
    return gzip.compress(text, 6) if compress else text


def jsonl_decode(content: bytes, steps: Steps, compress: bool) -> np.ndarray:
    """Back to log-probabilities."""
    text = gzip.decompress(content) if compress else content
    rows = [json.loads(line)["logits"] for line in text.splitlines()]
    return np.concatenate([np.array(row, np.float32) for row in rows]) - steps.lse[:, :1]


def methods(codec: Codec) -> list[Method]:
    """All that are compared, the reference first."""
    tables = len(save_tensors({n: np.ascontiguousarray(getattr(codec, n)) for n in codec.__dataclass_fields__}))
    plain_lse = lambda s: column(s.lse, s.lengths)  # noqa: E731
    raw_lse = lambda s: s.lse.tobytes()  # noqa: E731
    none = lambda s: b""  # noqa: E731
    return [
        Method(
            "float16, Parquet zstd",
            lambda s: column(s.logprobs, s.lengths),
            lambda b, s: uncolumn(b, s.logprobs.shape[1]),
            plain_lse,
            exact=True,
        ),
        Method(
            "float16, raw",
            lambda s: s.logprobs.tobytes(),
            lambda b, s: np.frombuffer(b, np.float16).reshape(s.logprobs.shape).copy(),
            raw_lse,
            exact=True,
        ),
        Method(
            "codec, Parquet zstd",
            lambda s: column(codec.encode(s.logprobs, s.states), s.lengths),
            lambda b, s: codec.decode(uncolumn(b, codec.columns, np.int8), s.states),
            lambda s: column(pack_lse(s.lse), s.lengths),
            tables,
        ),
        Method(f"top {TOP}, Parquet zstd", top_encode, top_decode, plain_lse),
        Method(
            "JSONL",
            lambda s: jsonl_encode(s, False),
            lambda b, s: jsonl_decode(b, s, False),
            none,
            exact=True,
            answers=JSONL_EXAMPLES,
        ),
        Method(
            "JSONL, gzip",
            lambda s: jsonl_encode(s, True),
            lambda b, s: jsonl_decode(b, s, True),
            none,
            exact=True,
            answers=JSONL_EXAMPLES,
        ),
    ]


def load(folder: str, units: range) -> list[Steps]:
    """The steps of some shards."""
    shards = open_shards(folder)
    found = []
    for unit in units:
        table = read_shard(shard_path(folder, unit))
        answers = np.split(table.answers, np.cumsum(table.lengths)[:-1])
        found.append(Steps(table.logprobs, table.lse, shards.compiled.automaton.states_before(answers), table.lengths))
    return found


def first(steps: Steps, answers: int | None) -> Steps:
    """The first answers of a shard."""
    if answers is None or answers >= len(steps.lengths):
        return steps
    cut = int(steps.lengths[:answers].sum())
    return Steps(steps.logprobs[:cut], steps.lse[:cut], steps.states[:cut], steps.lengths[:answers])


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """A call's result and its best time in seconds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return result, best


def measure(method: Method, parts: list[Steps], forced: np.ndarray) -> dict[str, Any]:
    """One row: sizes over all parts, errors over all steps, speeds as the median over parts of their best."""
    parts = [first(parts[0], method.answers)] if method.answers else parts
    size, lse, speeds, summaries = 0, 0, [], {"choice": [], "all": []}
    for part in parts:
        repeats = 1 if method.answers else REPEATS
        content, encode_s = timed(lambda part=part: method.encode(part), repeats)
        decoded, decode_s = timed(lambda part=part, content=content: method.decode(content, part), repeats)
        size, lse = size + len(content), lse + len(method.lse(part))
        speeds.append([part.logprobs.nbytes / 1e6 / s for s in (encode_s, decode_s)])
        if method.exact:
            np.testing.assert_allclose(decoded.astype(np.float32), part.logprobs.astype(np.float32), atol=1e-5)
        errors = np.zeros((len(part.states), len(TEMPERATURES))) if method.exact else divergence(part.logprobs, decoded)
        summaries["choice"].append(ErrorSummary.of(errors[~forced[part.states]]))
        summaries["all"].append(ErrorSummary.of(errors))
    steps = sum(len(part.states) for part in parts)
    encode, decode = np.median(speeds, axis=0)
    row = {"name": method.name, "steps": steps, "bytes_a_step": (size + lse + method.tables) / steps}
    row |= {"of_which": {"logits": size / steps, "lse": lse / steps, "tables": method.tables / steps}}
    return row | {"encode_mb_s": encode, "decode_mb_s": decode} | {k: errors_of(v, method.exact) for k, v in summaries.items()}


def errors_of(summaries: list[ErrorSummary], exact: bool) -> dict[str, list[float]]:
    """Mean and 99.9th percentile at each temperature, nats."""
    whole = summaries[0]
    for summary in summaries[1:]:
        whole = whole.merge(summary)
    rare = np.zeros(len(TEMPERATURES)) if exact else whole.percentile(99.9)
    return {"kl_mean": whole.mean().tolist(), "kl_p99.9": rare.tolist()}


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("store", "bytes/step", "ratio", "KL, choice steps: mean", "p99.9", "KL, all steps: mean", "p99.9")
    table.add_column("encode MB/s (ratio)")
    table.add_column("decode MB/s (ratio)")
    base = rows[0]
    text = lambda values: " ".join(f"{v:.1e}" if v else "0" for v in values)  # noqa: E731
    for row in rows:
        errors = [text(row[group][kind]) for group in ("choice", "all") for kind in ("kl_mean", "kl_p99.9")]
        speeds = [f"{row[k]:.0f} ({row[k] / base[k]:.2f})" for k in ("encode_mb_s", "decode_mb_s")]
        ratio = f"{row['bytes_a_step'] / base['bytes_a_step']:.3f}"
        table.add_row(row["name"], f"{row['bytes_a_step']:.1f}", ratio, *errors, *speeds)
    Console(width=190).print(table)


@click.command()
@click.option("--shards", "folder", required=True, help="Folder of plain (float16) logit shards, at least two.")
@click.option("--calibration", default=512, show_default=True, help="Answers of the first shard the codec is fitted on.")
@click.option("--measured", default=4, show_default=True, help="Shards measured after it, at most.")
def main(folder: str, calibration: int, measured: int) -> None:
    """Measures every way to store logits on real shards."""
    shards = open_shards(folder)
    units = min(shards.manifest.units, 1 + measured)
    if units < 2:
        raise click.UsageError("one shard is fitted on and others are measured: there have to be at least two")
    forced = shards.compiled.automaton.forced
    fitted = first(load(folder, range(1))[0], calibration)
    pa.set_cpu_count(1)
    codec, seconds = timed(lambda: Codec.fit(fitted.logprobs, fitted.states, forced), 1)
    parts = load(folder, range(1, units))
    rows = [measure(method, parts, forced) for method in methods(codec)]
    for row in rows:
        row["bytes_ratio"] = row["bytes_a_step"] / rows[0]["bytes_a_step"]
    show(rows)
    lse = [np.abs(unpack_lse(pack_lse(part.lse)) - part.lse).max(0).tolist() for part in parts]
    report = {
        "temperatures": TEMPERATURES,
        "watched": fitted.logprobs.shape[1],
        "fit": {"answers": len(fitted.lengths), "steps": len(fitted.states), "seconds": seconds},
        "codec": {"components": codec.components, "columns": codec.columns},
        "largest_lse_error": np.max(lse, axis=0).tolist(),
        "rows": rows,
    }
    print(f"fitted in {seconds:.1f} s on {len(fitted.lengths)} answers: {codec.components} components, {codec.columns} codes")
    keep("codec", report)


if __name__ == "__main__":
    main()
