"""Speed and memory of training a student on one machine, in plain PyTorch, with the product's own trainer and batches.

Without `--against` or `--memory` it times training steps. The model FLOPs of a step, forward and backward together, are

    6 · (N · T − F · (T − M))  +  6 · D · W · M  +  12 · L · D · Σ t² / 2

N numbers in the matrices of the blocks, F of them in the last feed-forward layer, which only predicted positions need, T tokens
read, M positions predicted, W output tokens, L layers, D width, t the length of each example (Kaplan et al., "Scaling Laws for
Neural Language Models", 2020, for the first two terms; Chowdhery et al., "PaLM", 2022, appendix B, for the attention, here
halved as it is causal). Padding counts as nothing. MFU is their rate over the best rate of large square matrix products that
take turns with the steps: same type, same threads, same noise. Making batches is timed apart, as training makes them in a
thread beside.

`--against thesis-loop` compares with a loop that runs every step of an answer forward and backward by itself, as the thesis'
1.25 s an example suggests: step k reads the comment and the answer's first k tokens and predicts one token. Gradients add up
over all steps of a batch and the optimizer steps once, which is generous to the loop. Model, type, loss, optimizer, allocator
and examples are the same, all contenders take turns on the same batches, and the loop's gradient has to be ours.

`--memory true-size` trains the thesis' student for a few steps, in one process and in two by DistributedDataParallel.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cluster.runtime import MALLOC
from pipeline.manifest import open_shards
from pipeline.payload import Stored
from student.config import StudentConfig, TrainConfig
from student.examples import Batch, Examples, open_examples
from student.loop import Training
from student.model import Shape, Student, embedding_rows
from student.order import Order, parts
from student.strategy import DataParallel, Tensors, make_strategy
from student.trainer import Sums, Trainer
from student.unpack import TRAIN

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "small": StudentConfig(layers=6, width=640, heads=10, mlp=2560),
    "true": StudentConfig(),  # the thesis'
}
THESIS_GPU_HOURS, THESIS_EXAMPLES, THESIS_EPOCHS = 2600, 500_000, 15
VOCABULARY, WATCHED, STEPS, CHOICES, CONTEXT = 262_144, 310, 36, 4, 100  # of synthetic examples
CORPUS_TOKENS = 7_000_000  # 500,000 comments of 14 tokens
SYNTHETIC = 2048
MATMULS = (2048, 3072, 4096)
EQUAL = 1e-4  # relative error of the loop's gradient, float32
LIMITS = {1: 14, 2: 22}  # GiB asked of true-size students, by workers


@dataclass(frozen=True)
class Data:
    """Examples, and what a student of them needs; `make` opens them as another kind of sequence.

    Attributes:
        make: the examples of a kind of sequence.
        shape: of the student.
        rows: the embedding's row of each id.
    """

    make: Callable[[str], Examples]
    shape: Shape
    rows: NDArray[np.int32]

    @cached_property
    def examples(self) -> Examples:
        """As the student reads them."""
        return self.make(self.shape.sequence)

    def of(self, sequence: str) -> Data:
        """The same in another kind of sequence."""
        return Data(self.make, replace(self.shape, sequence=sequence), self.rows)


def real_data(folder: str, student: StudentConfig, embeddings: str) -> Data:
    """The training split of an extraction."""
    shards = open_shards(folder)
    training = Training.of(student, TrainConfig(), shards)
    shape, rows = training.shape, training.rows
    if embeddings == "all":
        rows = np.arange(shape.input_vocabulary, dtype=np.int32)
    return Data(lambda sequence: open_examples(shards, TRAIN, sequence), replace(shape, embeddings=int(rows.max()) + 1), rows)


def synthetic_data(student: StudentConfig, embeddings: str) -> Data:
    """Examples of the thesis' sizes with made-up content: ids by Zipf's law, 3 to 25 of them, and answers of 36 steps."""
    random = np.random.default_rng(0)
    often_V = 1 / np.arange(1, VOCABULARY + 1)
    often_V = random.permutation(often_V / often_V.sum())
    answers = np.arange(STEPS, dtype=np.int32)
    rows = np.arange(VOCABULARY, dtype=np.int32)
    if embeddings == "corpus":
        rows = embedding_rows(random.multinomial(CORPUS_TOKENS, often_V), answers)
    columns = _synthetic_columns(random, often_V, answers)
    forced = np.arange(STEPS) % (STEPS // CHOICES) != 0
    compiled: Any = SimpleNamespace(automaton=SimpleNamespace(tokens=answers, forced=forced))
    stored = Stored(columns["values"], columns["lse"], None)
    shape = Shape(VOCABULARY, int(rows.max()) + 1, WATCHED, CONTEXT, **student.model_dump())
    return Data(lambda sequence: Examples(columns, compiled, stored, sequence == "choices"), shape, rows)


def _synthetic_columns(random: np.random.Generator, often_V: NDArray[Any], answers: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The columns of `student.unpack`; a separator has two tokens."""
    lengths, steps = random.integers(3, 26, SYNTHETIC) + 2, SYNTHETIC * STEPS
    logits = random.standard_normal((steps, WATCHED), np.float32)
    lse = np.log(np.exp(logits).sum(1, keepdims=True))
    starts = {"prefix": lengths, "answer": STEPS, "kept": STEPS, "choice": CHOICES}
    columns = {f"{name}_starts": np.r_[0, np.cumsum(np.broadcast_to(n, SYNTHETIC))] for name, n in starts.items()}
    return columns | {
        "prefix": random.choice(VOCABULARY, int(lengths.sum()), p=often_V).astype(np.int32),
        "answer": np.tile(answers, SYNTHETIC),
        "state": np.tile(np.arange(STEPS, dtype=np.int32), SYNTHETIC),
        "kept": np.ones(steps, bool),
        "values": (logits - lse).astype(np.float16),
        "lse": np.repeat(lse, 3, axis=1),
    }


class Contender:
    """A student that trains with the product's trainer, in whole sequences or step by step.

    Args:
        data: of the student.
        config: of the training.
        device: where it trains.
        together: examples of one pass of the thesis' loop; None trains whole sequences.
        strategy: holds the student; by default the configured one.
    """

    def __init__(
        self, data: Data, config: TrainConfig, device: torch.device, together: int | None = None, strategy: Any = make_strategy
    ) -> None:
        torch.manual_seed(config.seed)
        student = Student(data.shape, data.rows)
        self.counts = student.parameter_counts()
        self.strategy = strategy(student, config, device)
        self._data, self._device, self._together = data, device, together
        self._trainer = Trainer(self.strategy, config, data.shape, 1000, device)

    def batches(self, indices: NDArray[np.int64]) -> list[Batch]:
        """The passes of one optimizer step."""
        if self._together is None:
            return [self._data.examples.batch(indices).to(self._device)]
        groups = (indices[at : at + self._together] for at in range(0, len(indices), self._together))
        return [one.to(self._device) for group in groups for one in passes(self._data.examples.batch(group))]

    def step(self, indices: NDArray[np.int64], batches: list[Batch]) -> float:
        """One optimizer step on these examples; returns its seconds."""
        weight = self._data.examples.weight(indices, 1.0)
        return timed(lambda: self._trainer.step(batches, weight, Sums()), self._device)


def passes(batch: Batch) -> Iterator[Batch]:
    """The thesis' loop: a batch for each step of the answers, of what the student has read by then and one target a row.

    Rows are cut to the longest of the pass. What a shorter row holds behind its target is padding: causality hides it.
    """
    length = batch.tokens.shape[1]
    row_M, column_M = batch.predict // length, batch.predict % length
    first_M = torch.cat([torch.ones(1, dtype=torch.bool), row_M.diff() != 0])
    step_M = column_M - column_M[first_M][row_M]
    for step in range(int(step_M.max()) + 1):
        mine = (step_M == step).nonzero()[:, 0]
        read = int(column_M[mine].max()) + 1
        predict = torch.arange(len(mine)) * read + column_M[mine]
        rest = (values[mine] for values in (batch.targets, batch.teacher, batch.lse, batch.choice))
        yield Batch(batch.tokens[row_M[mine], :read], predict, *rest)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


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


def spread(batches: Iterator[NDArray[np.int64]], examples: Examples, count: int) -> list[NDArray[np.int64]]:
    """So many batches of an epoch's first, of lengths as the examples have them: from the quantiles of the batches' means."""
    pool = sorted(itertools.islice(batches, 64), key=lambda indices: float(examples.lengths[indices].mean()))
    return [pool[int((i + 0.5) / count * len(pool))] for i in np.random.default_rng(0).permutation(count)]


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


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held: the GPU's where it trains on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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


class Kept(DataParallel):
    """Keeps the gradients of the last step."""

    kept: Tensors

    def __init__(self, student: Student, config: TrainConfig, device: torch.device) -> None:
        super().__init__(student.to(device), config)

    def step(self, rate: float) -> torch.Tensor:
        """See `Strategy`."""
        self.kept = self.gradients()
        return super().step(rate)


def gradient_error(data: Data, config: TrainConfig, device: torch.device, indices: NDArray[np.int64], together: int) -> float:
    """How far the loop's gradient lies from that of whole sequences, relative to it."""
    gradients = []
    for form in (None, together):
        contender = Contender(data, config.model_copy(update={"precision": "float32"}), device, form, Kept)
        contender.step(indices, contender.batches(indices))
        gradients.append(torch.cat([gradient.flatten() for gradient in contender.strategy.kept.values()]))
    ours, loop = gradients
    return float((loop - ours).norm() / ours.norm())


LOOP = {
    "full": "ours, whole answers",
    "choices": "ours, choices alone",
    "loop": "thesis' loop, batches",
    "loop-1": "thesis' loop, 1",
}


def compare(data: Data, config: TrainConfig, device: torch.device, rounds: int, seconds: float, singles: int) -> dict[str, Any]:
    """Ours and the loop in turns on the same batches.

    Args:
        data: of whole answers.
        config: of the training.
        device: where to train.
        rounds: batches.
        seconds: a contender repeats a batch until so many have gone by in a round.
        singles: examples of a batch that the loop of one example a pass gets.
    """
    chosen = spread(Order(data.examples.lengths, config).epoch(1), data.examples, rounds)
    errors = {str(n): gradient_error(data, config, device, chosen[0][:4], n) for n in (1, 4)}
    if max(errors.values()) > EQUAL:
        raise SystemExit(f"the loop's gradient is not ours: relative errors {errors}")
    forms = {
        "full": (data, None),
        "choices": (data.of("choices"), None),
        "loop": (data, config.batch_size),
        "loop-1": (data, 1),
    }
    contenders = {name: Contender(of, config, device, together) for name, (of, together) in forms.items()}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number, indices in enumerate(chosen):
        for name, contender in contenders.items():
            mine = indices[:: max(1, len(indices) // singles)] if name == "loop-1" else indices
            rates[name].append(_rate(contender, mine, seconds, warm_up=number == 0))
            print(f"round {number + 1} {name}: {rates[name][-1]:.3f} examples/s", file=sys.stderr)
    return {"gradient_error": errors, "examples_per_second": rates, "batch_size": config.batch_size}


def _rate(contender: Contender, indices: NDArray[np.int64], seconds: float, warm_up: bool) -> float:
    batches, done, took = contender.batches(indices), 0, 0.0
    if warm_up:
        contender.step(indices, batches[:2])
    while not done or took < seconds:
        took += contender.step(indices, batches)
        done += len(indices)
    return done / took


def show_comparison(done: dict[str, Any]) -> None:
    """The table: medians over the rounds, of the ratios too."""
    rates = done["examples_per_second"]
    table = Table("", "examples/s", "rounds", "× loop, batches", "× loop, 1", box=None)
    for name, label in LOOP.items():
        against = [np.divide(rates[name], rates[other]) for other in ("loop", "loop-1")]
        ratios = [f"{np.median(r):.1f} ({r.min():.1f} to {r.max():.1f})" for r in against]
        rounds = " ".join(f"{rate:.3g}" for rate in rates[name])
        table.add_row(label, f"{statistics.median(rates[name]):.3g}", rounds, *ratios)
    Console(width=128).print(table)
    errors = ", ".join(f"{error:.1e} by {together}" for together, error in done["gradient_error"].items())
    print(f"relative error of the loop's gradient: {errors} together; batches of {done['batch_size']}")


def train_share(data: Data, config: TrainConfig, rank: int, workers: int, meeting: str, steps: int) -> dict[str, float]:
    """One worker's part of a few steps, and its peak memory."""
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    contender, start = Contender(data, config, torch.device("cpu")), time.perf_counter()
    for indices in itertools.islice(Order(data.examples.lengths, config).epoch(1), steps):
        mine = parts(indices, rank, workers, 1)[0]
        contender.step(indices, contender.batches(mine))
    if workers > 1:
        dist.destroy_process_group()
    return {"peak_gib": peak_gib(torch.device("cpu")), "seconds": time.perf_counter() - start} | contender.counts


def available_gib() -> float:
    """Memory that is free on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def memory(arguments: list[str], counts: tuple[int, ...]) -> dict[str, Any]:
    """Peak memory of true-size students, in fresh processes, for each number of workers."""
    results = {}
    for workers in counts:
        if available_gib() < LIMITS[workers]:
            print(
                f"{workers} workers left out: {available_gib():.1f} GiB are free, {LIMITS[workers]} are asked", file=sys.stderr
            )
            continue
        results[str(workers)] = _workers(arguments, workers)
    return results


def _workers(arguments: list[str], workers: int) -> list[dict[str, float]]:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    with tempfile.TemporaryDirectory() as folder:
        common = [
            sys.executable,
            "-m",
            "benchmarks.training",
            *arguments,
            f"--meeting={folder}/meeting",
            f"--workers={workers}",
        ]
        started = [
            subprocess.Popen(
                [*common, f"--rank={rank}"],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": threads},
            )
            for rank in range(workers)
        ]
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a worker failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def show_memory(results: dict[str, Any]) -> None:
    """The table."""
    table = Table("workers", "peaks, GiB", "together", "asked", "parameters, M", "of the embedding", "seconds", box=None)
    for workers, rows in results.items():
        peaks = [row["peak_gib"] for row in rows]
        sizes = [f"{rows[0][name] / 1e6:.0f}" for name in ("rest", "embedding")]
        each, limit = " ".join(f"{peak:.2f}" for peak in peaks), f"under {LIMITS[int(workers)]}"
        table.add_row(workers, each, f"{sum(peaks):.2f}", limit, *sizes, f"{rows[0]['seconds']:.0f}")
    Console(width=128).print(table)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def with_allocator() -> None:
    """Starts this process anew under the allocator settings of training workers, which glibc reads only at the start."""
    if not all(os.environ.get(name) == value for name, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]])


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
        click.option("--out", default="runs/benchmarks/training.json", show_default=True),
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
    report = {"machine": machine(device), "options": given, "results": done}
    Path(given["out"]).parent.mkdir(parents=True, exist_ok=True)
    Path(given["out"]).write_text(json.dumps(report, indent=2) + "\n")


def run(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What was asked for; prints its table."""
    if given["memory_of"]:
        passed = [f"--{name}={given[name.replace('-', '_')]}" for name in ("embeddings", "sequence", "precision", "batch-size")]
        counts = tuple(int(count) for count in given["memory_workers"])
        done = memory(["--shape=true", "--synthetic", "--steps=3", "--device=cpu", *passed], counts)
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
