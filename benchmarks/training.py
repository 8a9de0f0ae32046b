"""Speed and memory of training a student on one machine, in plain PyTorch, with the product's own trainer and batches.

Without `--against` or `--memory` it times training steps. The model FLOPs of a step, forward and backward together, are

    6 · (N · T − F · (T − M))  +  6 · D · W · M  +  12 · L · D · Σ t² / 2

N numbers in the matrices of the blocks, F of them in the last feed-forward layer, which only predicted positions need, T tokens
read, M positions predicted, W output tokens, L layers, D width, t the length of each example (Kaplan et al., "Scaling Laws for
Neural Language Models", 2020, for the first two terms; Chowdhery et al., "PaLM", 2022, appendix B, for the attention, here
halved as it is causal). Padding counts as nothing. MFU is their rate over the best rate of large square matrix products that
take turns with the steps: same type, same threads, same noise. Making batches is timed apart, as training makes them in a
thread beside.

`--against thesis-loop` is told of in `benchmarks.thesis_loop`, `--memory true-size` in `benchmarks.true_size`.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import sys
import time
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.results import keep
from benchmarks.students import Contender, Data, peak_gib, real_data, spread, synthetic_data, timed
from benchmarks.thesis_loop import compare, show_comparison
from benchmarks.true_size import memory, show_memory, train_share
from pipeline.base.runtime import MALLOC
from student.config import THESIS, StudentConfig, TrainConfig
from student.data.examples import Batch
from student.model.shape import Shape
from student.train.order import Order

COMMAND = [sys.executable, "-m", "benchmarks.training"]
SHAPES = {
    "small": StudentConfig(layers=6, width=640, heads=10, mlp=2560),
    "true": THESIS,
}
THESIS_GPU_HOURS, THESIS_EXAMPLES, THESIS_EPOCHS = 2600, 500_000, 15
MATMULS = (2048, 3072, 4096)


def flops(shape: Shape, lengths: NDArray[np.int64], predicted: int) -> float:
    """Of one training step on examples of these lengths, see the module's docstring."""
    feed, tokens = 2 * shape.width * shape.mlp, int(lengths.sum())
    matrices = shape.layers * (4 * shape.width**2 + feed) * tokens - feed * (tokens - predicted)
    attention = 6 * shape.layers * shape.width * float((lengths.astype(np.float64) ** 2).sum())
    return 6.0 * matrices + 6.0 * shape.width * shape.output_vocabulary * predicted + attention


class Matmul:
    """The machine's rate of square matrix products, as often as it is asked."""

    def __init__(self, precision: str, device: torch.device) -> None:
        self._dtype, self._device = torch.bfloat16 if precision == "bf16" else torch.float32, device
        self._sizes = itertools.cycle(size * (4 if device.type == "cuda" else 1) for size in MATMULS)
        self.rows: list[dict[str, float]] = []

    def measure(self) -> None:
        """Times one product, of the next size, after one that is not timed."""
        size = next(self._sizes)
        a, b = (torch.randn(size, size, device=self._device).to(self._dtype) for _ in range(2))
        timed(lambda: a @ b, self._device)
        seconds = timed(lambda: a @ b, self._device)
        self.rows.append({"size": size, "seconds": seconds, "flops": 2 * size**3 / seconds})

    @property
    def best(self) -> float:
        """FLOP/s."""
        return max(row["flops"] for row in self.rows)


def time_steps(data: Data, config: TrainConfig, device: torch.device, steps: int, seconds: float) -> dict[str, Any]:
    """Times training steps and matrix products in turns."""
    contender, matmul = Contender(data, config, device), Matmul(config.precision, device)
    rows, started = [], time.perf_counter()
    for i, indices in enumerate(spread(Order(data.examples.lengths, config).epoch(1), data.examples, steps + 1)):
        began = time.perf_counter()
        batches = contender.batches(indices)
        making, took = time.perf_counter() - began, contender.step(indices, batches)
        matmul.measure()
        if i:  # the first one warms up
            rows.append(_step_row(data, indices, batches[0]) | {"seconds": took, "making": making})
        if i and time.perf_counter() - started > seconds:
            break
    return {"parameters": contender.counts, "peak_gib": peak_gib(device), "matmul": matmul.rows} | _summary(rows, matmul.best)


def _step_row(data: Data, indices: NDArray[np.int64], batch: Batch) -> dict[str, float]:
    lengths = data.examples.lengths[indices]
    work = flops(data.shape, lengths, len(batch.predict))
    return {"examples": len(indices), "tokens": int(lengths.sum()), "padded": batch.tokens.numel(), "flops": work}


def _summary(rows: list[dict[str, float]], matmul: float) -> dict[str, Any]:
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    rates = [row["flops"] / row["seconds"] for row in rows]
    return {
        "examples_per_second": total["examples"] / total["seconds"],
        "tokens_per_second": total["tokens"] / total["seconds"],
        "padding": 1 - total["tokens"] / total["padded"],
        "mfu": total["flops"] / total["seconds"] / matmul,
        "mfu_best_step": max(rates) / matmul,
        "matmul_flops": matmul,
        "making_share": total["making"] / total["seconds"],
        "rows": rows,
    }


def show_steps(done: dict[str, Any], device: torch.device) -> None:
    """The table."""
    table = Table("", "", box=None, show_header=False)
    counts = {name: f"{count / 1e6:.1f} M" for name, count in done["parameters"].items()}
    table.add_row("parameters", f"{counts['rest']} and {counts['embedding']} of the embedding")
    table.add_row("examples/s", f"{done['examples_per_second']:.2f}")
    table.add_row("tokens/s, without padding", f"{done['tokens_per_second']:.0f}")
    table.add_row("padding", f"{done['padding']:.1%}")
    table.add_row("step, s: median (all)", _seconds([row["seconds"] for row in done["rows"]]))
    table.add_row("making a batch / a step", f"{done['making_share']:.1%}")
    table.add_row("matrix products, s: median (all)", _seconds([row["seconds"] for row in done["matmul"]]))
    table.add_row("best matrix product, GFLOP/s", f"{done['matmul_flops'] / 1e9:.1f}")
    table.add_row("MFU: all steps, best step", f"{done['mfu']:.1%}, {done['mfu_best_step']:.1%}")
    table.add_row("peak memory, GiB", f"{done['peak_gib']:.2f}")
    if device.type == "cuda":
        hours = THESIS_EPOCHS * THESIS_EXAMPLES / done["examples_per_second"] / 3600
        table.add_row(
            f"GPU-hours, {THESIS_EPOCHS} epochs of {THESIS_EXAMPLES:,}", f"{hours:.2f} (thesis: {THESIS_GPU_HOURS:,})"
        )
    Console(width=128).print(table)


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({' '.join(f'{value:.3f}' for value in values[:8])}{' …' if values[8:] else ''})"


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def with_allocator() -> None:
    """Starts this process anew under the allocator settings of training workers, which glibc reads only at the start."""
    if not all(os.environ.get(name) == value for name, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [*COMMAND, *sys.argv[1:]])


def options(command: Any) -> Any:
    """The command's options."""
    sizes = [
        click.option(f"--{name}", type=int, help="By default the shape's.") for name in ("layers", "width", "heads", "mlp")
    ]
    others = [
        click.option("--shards", help="A finished extraction; without it, examples are synthetic."),
        click.option(
            "--synthetic", is_flag=True, help="Made-up examples of the thesis' sizes: 262,144 ids, 36 steps, W = 310."
        ),
        click.option("--shape", type=click.Choice(list(SHAPES)), default="small", show_default=True),
        click.option("--sequence", type=click.Choice(["full", "choices"]), default="full", show_default=True),
        click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True),
        click.option("--embeddings", type=click.Choice(["corpus", "all"]), default="corpus", show_default=True),
        click.option("--batch-size", default=32, show_default=True),
        click.option("--steps", default=20, show_default=True, help="Steps to time, at most."),
        click.option("--seconds", type=float, help="Time for the steps, or for each turn against the loop: 60 and 10."),
        click.option("--against", type=click.Choice(["thesis-loop"])),
        click.option("--rounds", default=3, show_default=True, help="Against the loop: batches."),
        click.option("--singles", default=8, show_default=True, help="Examples of a batch for the loop of one a pass."),
        click.option("--memory", "memory_of", type=click.Choice(["true-size"])),
        click.option("--memory-workers", type=click.Choice(["1", "2"]), multiple=True, default=("1", "2"), show_default=True),
        click.option("--threads", type=int, help="CPU threads; by default PyTorch's."),
        click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True),
        click.option("--rank", type=int, hidden=True),
        click.option("--workers", default=1, hidden=True),
        click.option("--meeting", default="", hidden=True),
    ]
    for option in reversed(sizes + others):
        command = option(command)
    return command


@click.command()
@options
def main(**given: Any) -> None:
    """Times training steps, compares them with the thesis' loop, or measures memory."""
    with_allocator()
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    device = torch.device(given["device"])
    if given["rank"] is not None:
        worker = {name: given[name] for name in ("rank", "workers", "meeting", "steps")}
        print(json.dumps(train_share(data_of(given), config_of(given), **worker)))
        return
    done = run(given, device)
    kind = "training_memory" if given["memory_of"] else "thesis_loop" if given["against"] else "training"
    keep(kind, {"device": machine(device), "results": done})


def run(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What was asked for; prints its table."""
    if given["memory_of"]:
        passed = [f"--{name}={given[name.replace('-', '_')]}" for name in ("embeddings", "sequence", "precision", "batch-size")]
        counts = tuple(int(count) for count in given["memory_workers"])
        done = memory([*COMMAND, "--shape=true", "--synthetic", "--steps=3", "--device=cpu", *passed], counts)
        show_memory(done)
    elif given["against"]:
        done = compare(
            data_of(given | {"sequence": "full"}),
            config_of(given),
            device,
            given["rounds"],
            given["seconds"] or 10,
            given["singles"],
        )
        show_comparison(done)
    else:
        done = time_steps(data_of(given), config_of(given), device, given["steps"], given["seconds"] or 60)
        show_steps(done, device)
    return done


def data_of(given: dict[str, Any]) -> Data:
    """The examples and the student asked for."""
    sizes = {name: given[name] for name in ("layers", "width", "heads", "mlp") if given[name]}
    student = SHAPES[given["shape"]].model_copy(update=sizes | {"sequence": given["sequence"]})
    if given["shards"] and not given["synthetic"]:
        return real_data(given["shards"], student, given["embeddings"])
    return synthetic_data(student, given["embeddings"])


def config_of(given: dict[str, Any]) -> TrainConfig:
    """The training asked for."""
    return TrainConfig(batch_size=given["batch_size"], precision=given["precision"])


if __name__ == "__main__":
    main()
