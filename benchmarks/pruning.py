"""What a student gains from being cut from a trained model: agreement after equally many steps, by how it was begun.

Each way of beginning is trained at several sizes and seeds on the same batches with the product's trainer, in this process.
Results are appended to a file as they come, so the same command goes on with what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.results import keep
from pipeline.base.plots import STYLE
from pipeline.shards.manifest import Shards, open_shards
from student.config import PruneConfig, TrainConfig
from student.data.answers import parse_all, teacher_answers
from student.data.examples import Examples, open_examples
from student.data.unpack import TEST, TRAIN
from student.decode.decode import Decoder
from student.evaluate.fidelity import agreement
from student.evaluate.speed import latency_ms
from student.model.checkpoint import assembled
from student.model.model import Student
from student.prune.cut import choose, cut
from student.prune.importance import LEAVE_OUT, Importance, importance, measure
from student.prune.parent import Parent
from student.prune.sizes import Sizes, target_sizes
from student.prune.source import open_source
from student.train.order import Order
from student.train.strategy import make_strategy
from student.train.trainer import Sums, Trainer

CPU = torch.device("cpu")
MEASURED = (1 / 12, 1 / 6, 1 / 3, 2 / 3, 1)  # shares of the steps after which agreement is measured
ROUNDS = 4  # of scoring and cutting, where they take turns
HIDDEN = 1.0  # weight of the hidden states' distance
WAYS = {
    "width": "by width",
    "depth": "by depth",
    "depth-cosine": "by depth, block importance",
    "interleaved": f"by width, scored {ROUNDS} times",
    "width-hidden": "by width, hidden states too",
    "depth-hidden": "by depth, hidden states too",
    "random": "by width, at random",
    "scratch": "random weights of that shape",
}


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        way: of `WAYS`.
        fraction: of the source's parameters, at most.
        seed: of the batches, and of what is random in the beginning.
    """

    way: str
    fraction: float
    seed: int


def _ranks(measured: Importance, trial: Trial) -> Importance:
    """What decides who stays: the measured importance, or another to compare it with."""
    if trial.way == "depth-cosine":
        return replace(measured, loss_L=measured.cosine_L)
    if trial.way != "random":
        return measured
    draw = np.random.default_rng(trial.seed).random
    return Importance(**{name: draw(values.shape) for name, values in vars(measured).items()})


class Bench:
    """A source, its importance, and trainings of what is cut from it."""

    def __init__(self, shards: Shards, config: PruneConfig, steps: int, rate: float | None, comments: int) -> None:
        self.shards, self._steps, self._rate = shards, steps, rate
        opened = open_source(config, "full", shards)
        self.source = opened.load(shards.compiled.watched.tokens)
        reads = (self.source.shape.sequence, self.source.shape.separator)
        self._train, self._test = open_examples(shards, TRAIN, *reads), open_examples(shards, TEST, *reads).first(comments)
        self.importance = self._score(self.source)

    def _score(self, model: Student) -> Importance:
        chosen = np.linspace(0, len(self._train) - 1, 1024).astype(np.int64)
        sums = measure(model, self._train, chosen, LEAVE_OUT, 32)
        return importance([sums], model.shape.layers)

    def sizes(self, trial: Trial) -> Sizes:
        """Of a trial's student."""
        by = "depth" if trial.way.startswith("depth") else "width"
        return target_sizes(PruneConfig(fraction=trial.fraction, by=by), self.source.shape)

    def run(self, trial: Trial) -> dict[str, Any]:
        """Begins, measures, trains, and measures again."""
        torch.manual_seed(trial.seed)
        student, parent = self._begin(trial)
        agreements = {0: self.agreement(student)}
        begun = None if trial.way == "scratch" else trial.way  # the default learning rate goes by it
        config = TrainConfig(seed=trial.seed, learning_rate=self._rate, init=begun, hidden=HIDDEN * bool(parent))
        trainer = Trainer(make_strategy(student, config, CPU), config, student.shape, self._steps, CPU, parent=parent)
        for step, indices in enumerate(self._batches(config), 1):
            trainer.step([self._train.batch(indices)], self._train.weight(indices, 1.0), Sums())
            if step in {max(1, round(share * self._steps)) for share in MEASURED}:
                agreements[step] = self.agreement(student)
        sizes = asdict(self.sizes(trial))
        return asdict(trial) | {"agreement": agreements, "sizes": sizes, "parameters": sum(student.parameter_counts().values())}

    def _begin(self, trial: Trial) -> tuple[Student, Parent | None]:
        sizes = self.sizes(trial)
        kept = choose(_ranks(self.importance, trial), self.source.shape, sizes)
        student = self._interleaved(sizes) if trial.way == "interleaved" else cut(self.source, kept)
        if trial.way == "scratch":
            return Student(student.shape, student.rows.numpy()), None
        if trial.way.endswith("hidden"):
            parent = assembled(self.source.shape, dict(self.source.state_dict()))
            return student, Parent(student, parent, kept.layers.tolist(), kept.channels.tolist())
        return student, None

    def _interleaved(self, sizes: Sizes) -> Student:
        """Scores and cuts in turns, each time by the same share."""
        student, scores = self.source, self.importance
        for done in range(1, ROUNDS + 1):
            whole, power = Sizes.of(self.source.shape), done / ROUNDS
            mixed = {n: round(a * (getattr(sizes, n) / a) ** power) for n, a in vars(whole).items()}
            mixed |= (
                {"heads": sizes.heads, "groups": sizes.groups}
                if power > 0.5
                else {"heads": whole.heads, "groups": whole.groups}
            )
            scores = self._score(student) if done > 1 else scores
            student = cut(student, choose(scores, student.shape, Sizes(**mixed)))
        return student

    def _batches(self, config: TrainConfig) -> Iterator[Any]:
        order = Order(self._train.lengths, config.with_batch(False))
        batches = (indices for epoch in range(1, 1000) for indices in order.epoch(epoch))
        return (indices for _, indices in zip(range(self._steps), batches, strict=False))

    def agreement(self, student: Student) -> float:
        """Share of the test comments whose whole answer is the teacher's."""
        test: Examples = self._test
        decoder, tokens = Decoder(student.eval(), self.shards.compiled), []
        for start in range(0, len(test), 128):
            tokens += decoder.constrained([test.prefix(i) for i in range(start, min(start + 128, len(test)))]).tokens
        task = self.shards.compiled.task
        return float(agreement(task, teacher_answers(test), parse_all(self.shards.compiled, tokens))["whole"])

    def speeds(self, trials: list[Trial], rounds: int = 5) -> list[dict[str, Any]]:
        """Answers a second and milliseconds of one comment alone, of the source and of students of these sizes, by turns."""
        students = {"source": self.source} | {f"{t.way} {t.fraction:g}": self._begin(t)[0].eval() for t in trials}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in students}
        for _ in range(rounds):
            for name, student in students.items():
                found[name].append((self._rate_of(student), latency_ms(student, self.shards.compiled, self._test)))
        medians = {name: np.median(np.array(values), axis=0) for name, values in found.items()}
        return [
            {"student": name, "answers_per_second": rate, "latency_ms": latency}
            | {"times_faster": rate / medians["source"][0], "times_sooner": medians["source"][1] / latency}
            for name, (rate, latency) in medians.items()
        ]

    def _rate_of(self, student: Student) -> float:
        started = time.perf_counter()
        self.agreement(student)
        return len(self._test) / (time.perf_counter() - started)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each way and size, at the beginning and after each measured step."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["way"], row["fraction"]), []).append(row)
    return [
        _summary(members) for _, members in sorted(groups.items(), key=lambda item: (-item[0][1], list(WAYS).index(item[0][0])))
    ]


def _summary(members: list[dict[str, Any]]) -> dict[str, Any]:
    steps = members[0]["agreement"].keys()
    about = {name: members[0][name] for name in ("way", "fraction", "sizes", "parameters")}
    values = {step: [member["agreement"][step] for member in members] for step in steps}
    return about | {
        "seeds": len(members),
        "mean": {step: float(np.mean(found)) for step, found in values.items()},
        "spread": {step: float(np.std(found, ddof=1)) if len(found) > 1 else 0.0 for step, found in values.items()},
    }


def show(summaries: list[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    steps = [step for step in summaries[0]["mean"] if all(step in row["mean"] for row in summaries)]
    table = Table(
        "begun", "parameters", "layers × width, heads, neurons", *(f"after {step} steps" for step in steps), title=title
    )
    for row in summaries:
        sizes = row["sizes"]
        shape = f"{sizes['layers']} × {sizes['width']}, {sizes['heads']}, {sizes['mlp']}"
        found = [f"{100 * row['mean'][step]:.1f} ± {100 * row['spread'][step]:.1f}" for step in steps]
        table.add_row(WAYS[row["way"]], f"{row['parameters'] / 1e6:.2f} M", shape, *found)
    Console(width=150).print(table)


def show_speeds(rows: list[dict[str, Any]]) -> None:
    """Prints the table and keeps it."""
    keep("pruning_speed", {"rows": rows})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)


def plot(summaries: list[dict[str, Any]], path: str) -> None:
    """Agreement against size, at the beginning and at the end; against steps, at the largest and at the smallest size."""
    steps, sizes = list(summaries[0]["mean"]), sorted({row["fraction"] for row in summaries})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 8), layout="constrained")
        axes = [figure.add_subplot(2, 2, place) for place in range(1, 5)]
        for axis, step in zip(axes, (steps[0], steps[-1]), strict=False):
            by_way = {way: [row for row in summaries if row["way"] == way] for way in WAYS}
            _lines(axis, {way: [(row["parameters"] / 1e6, row, step) for row in rows] for way, rows in by_way.items()})
            axis.set(
                xlabel="million parameters",
                title=f"after {step} steps",
                xscale="log",
                ylabel="whole answers as the teacher's, %",
            )
        for axis, size in zip(axes[2:], (sizes[-1], sizes[0]), strict=True):
            mine = [row for row in summaries if row["fraction"] == size]
            _lines(axis, {row["way"]: [(int(step), row, step) for step in row["mean"]] for row in mine})
            axis.set(xlabel="steps", title=f"{size:g} of the source's parameters", ylabel="whole answers as the teacher's, %")
        axes[1].legend(fontsize=8)
        figure.savefig(path, dpi=100)


def _lines(axis: Any, lines: dict[str, list[tuple[float, dict[str, Any], str]]]) -> None:
    """A line a way, in the way's own colour."""
    for place, (way, name) in enumerate(WAYS.items()):
        if points := lines.get(way):
            means = [100 * row["mean"][step] for _, row, step in points]
            spreads = [100 * row["spread"][step] for _, row, step in points]
            axis.errorbar(
                [x for x, _, _ in points], means, spreads, fmt="o-", ms=4, lw=1.2, capsize=2, label=name, color=f"C{place}"
            )


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR")
@click.option("--source", required=True, metavar="MODEL", help="A student's folder, or a Gemma 3 model.")
@click.option("--fractions", default="1/2,1/4,1/8", show_default=True, help="Sizes, as shares of the source's parameters.")
@click.option("--ways", default="width,random,scratch", show_default=True, help=f"Of {', '.join(WAYS)}.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=150, show_default=True, help="Of 32 examples.")
@click.option("--rate", type=float, help="Learning rate; by default the training's.")
@click.option("--comments", default=1000, show_default=True, help="Test comments to measure on.")
@click.option("--out", required=True, metavar="FILE", help="JSON lines, one a training; its name is the result's too.")
@click.option("--plot", "picture", metavar="PNG")
@click.option("--speed", is_flag=True, help="Measure how fast the students are, instead of training them.")
def main(
    shards: str, source: str, fractions: str, ways: str, seeds: int, out: str, picture: str | None, speed: bool, **how: Any
) -> None:
    """Runs what is missing, then prints and draws all there is."""
    shares = PruneConfig(chain=fractions).chain if "," in fractions else (PruneConfig(fraction=fractions).fraction or 1.0,)
    wanted = [Trial(way, share, seed) for seed in range(seeds) for share in shares for way in ways.split(",")]

    def bench() -> Bench:
        return Bench(open_shards(shards), PruneConfig(source=source), **how)

    if speed:
        show_speeds(bench().speeds(wanted))
        return
    done = run_missing(bench, wanted, Path(out))
    summaries = summarise(done)
    keep(Path(out).stem, {"rows": summaries})
    show(summaries, f"whole answers as the teacher's, %, of {how['comments']:,} test comments")
    if picture:
        plot(summaries, picture)


def run_missing(bench: Callable[[], Bench], wanted: list[Trial], out: Path) -> list[dict[str, Any]]:
    """All results, those the file has already among them."""
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {Trial(row["way"], row["fraction"], row["seed"]) for row in done}
    missing = [trial for trial in wanted if trial not in known]
    opened = bench() if missing else None
    for trial in missing:
        done.append(json.loads(json.dumps(opened.run(trial))))
        with out.open("a") as stream:
            stream.write(json.dumps(done[-1]) + "\n")
        Console().print(f"{trial}: {done[-1]['agreement']}", highlight=False)
    return done


if __name__ == "__main__":
    main()
