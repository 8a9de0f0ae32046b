"""Every objective at equal steps on one extraction: fidelity, step accuracy and calibration on unseen comments.

Each training is one process on one thread, `--jobs` of them side by side, as trainings on one thread each get more out of a
few cores than one training on all. What is finished is kept in `--out` and not done again, so a run may be stopped.
All contenders run with the first seed; those within `--close` points of the best then run with the others.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from pipeline.shards.manifest import open_shards
from student.config import StudentConfig, TrainConfig
from student.data.answers import parse_all
from student.data.examples import open_examples
from student.data.unpack import TEST
from student.decode.decode import Decoder
from student.evaluate.fidelity import agreement, step_measures, step_sums
from student.model.checkpoint import assembled
from student.model.model import Student
from student.train.loop import Loop, Training
from student.train.worker import disagreement

BATCH = 128


@dataclass(frozen=True)
class Contender:
    """A training: what it changes of the configuration that all share."""

    train: dict[str, Any]
    student: dict[str, Any] = field(default_factory=dict)
    steps: float = 1.0  # share of the others' steps


CONTENDERS = {
    "hard-label": Contender({"objective": "hard-label"}),
    "hard-label, smoothing 0.1": Contender({"objective": "hard-label", "label_smoothing": 0.1}),
    "curriculum 0.8 → 0.2": Contender({"objective": "curriculum"}),
    "curriculum, tail class": Contender({"objective": "curriculum", "tail": True}),
    "KL, then CE (step)": Contender({"kl_start": 1, "kl_end": 0.5, "ce_start": 0, "ce_end": 0.5, "weights": "step"}),
    "KL alone": Contender({"kl_start": 1, "kl_end": 1, "ce_start": 0, "ce_end": 0}),
    "temperature 2": Contender({"objective": "temperature"}),
    "temperature 2, two thirds of the steps": Contender({"objective": "temperature"}, steps=2 / 3),
    "temperature 4": Contender({"objective": "temperature", "temperature": 4}),
    "topk 100": Contender({"objective": "topk"}),
    "slim 5 %": Contender({"objective": "slim"}),
    "reverse-kl": Contender({"objective": "reverse-kl"}),
    "temperature 2, full sequence": Contender({"objective": "temperature"}, {"sequence": "full"}),
}


def train(name: str, seed: int, folder: str, student: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """One training and what it came to on the test split, by its best epoch."""
    torch.set_num_threads(1)
    contender, shards, started = CONTENDERS[name], open_shards(folder), time.perf_counter()
    shape = StudentConfig.model_validate({"sequence": "choices"} | student | contender.student)
    epochs = max(1, round(config["epochs"] * contender.steps))
    settings = TrainConfig.model_validate(config | contender.train | {"epochs": epochs, "seed": seed, "log_every": 50})
    training = Training.of(shape, settings, shards)
    loop = Loop(training, shards)
    model = best_student(training, loop)
    seconds = time.perf_counter() - started
    about = {"name": name, "seed": seed, "seconds": seconds, "steps": loop.position.step, "history": loop.position.history}
    return about | {"parameters": model.parameter_counts()} | fidelity(model, folder)


def best_student(training: Training, loop: Loop) -> Student:
    """Runs a training to its end; the student of its best epoch."""
    best, weights = float("inf"), {}
    for report in loop.run():
        if report.epoch_ended and disagreement(report.row) < best:
            best = disagreement(report.row)
            weights = {key: tensor.clone() for key, tensor in loop.state().average.items()}
    return assembled(training.shape, weights | {"rows": torch.from_numpy(training.rows)})


def fidelity(model: Any, folder: str) -> dict[str, Any]:
    """Agreement with the teacher on the test split, and measures of its steps."""
    shards = open_shards(folder)
    test, compiled = open_examples(shards, TEST, model.shape.sequence, model.shape.separator), shards.compiled
    rows = np.argsort(test.lengths, kind="stable")
    parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    decoder = Decoder(model, compiled)
    answers = [answer for part in parts for answer in decoder.constrained([test.prefix(i) for i in part]).tokens]
    teacher = [answer for answer in parse_all(compiled, [test.answer(i).tolist() for i in rows]) if answer is not None]
    found = agreement(compiled.task, teacher, parse_all(compiled, answers))
    steps = step_measures(step_sums(model, (test.batch(part) for part in parts)))
    return {"whole": found["whole"], "fields": found["fields"], "steps": steps, "test": len(test)}


def close_ones(results: list[dict[str, Any]], points: float) -> list[str]:
    """The contenders whose first seed is within so many points of the best one's whole answers."""
    first = {row["name"]: row["whole"] for row in results if row["seed"] == 0}
    return [name for name, whole in first.items() if whole > max(first.values()) - points / 100]


def run(todo: list[tuple[str, int]], jobs: int, out: Path, **shared: Any) -> list[dict[str, Any]]:
    """Runs what `out` does not hold yet; returns all it then holds."""
    results = json.loads(out.read_text()) if out.exists() else []
    done = {(row["name"], row["seed"]) for row in results}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = [pool.submit(train, *each, **shared) for each in todo if each not in done]
        for future in as_completed(futures):
            row = future.result()
            results.append(row)
            out.write_text(json.dumps(results, indent=1))
            Console().print(f"{row['name']}, seed {row['seed']}: whole {100 * row['whole']:.1f} %, {row['seconds']:.0f} s")
    return results


def spread(rows: list[dict[str, Any]], value: Any, digits: int = 1) -> str:
    """Mean and, of several seeds, the standard deviation."""
    values = [value(row) for row in rows]
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def grouped(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by contender, the best first."""
    groups = {name: [row for row in results if row["name"] == name] for name in CONTENDERS}
    means = {name: np.mean([row["whole"] for row in rows]) for name, rows in groups.items() if rows}
    return {name: groups[name] for name in sorted(means, key=lambda name: -means[name])}


def columns(fields: list[str]) -> dict[str, Any]:
    """What the table shows of a row, by heading."""
    shares = {"whole answer %": lambda row: 100 * row["whole"]}
    shares |= {f"{name} %": lambda row, name=name: 100 * row["fields"][name] for name in fields}
    return shares | {"choice steps %": lambda row: 100 * row["steps"]["choice_accuracy"]}


def show(results: list[dict[str, Any]]) -> None:
    """The table, in Markdown too, so that it can be copied into a page."""
    heads = columns(list(results[0]["fields"]))
    table = Table("objective", "seeds", *heads, "ECE", "KL, nats", "seconds", box=MARKDOWN)
    for name, rows in grouped(results).items():
        cells = [spread(rows, value) for value in heads.values()]
        cells.append(spread(rows, lambda row: row["steps"]["calibration"]["ece"], 3))
        cells.append(spread(rows, lambda row: row["steps"]["choice_kl"], 3))
        table.add_row(name, str(len(rows)), *cells, f"{np.mean([row['seconds'] for row in rows]):.0f}")
    Console(width=190).print(table)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Agreement on whole answers, a dot a training."""
    groups = grouped(results)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 0.36 * len(groups) + 1.2), layout="constrained")
        axes = figure.add_subplot()
        for place, rows in enumerate(reversed(groups.values())):
            whole = [100 * row["whole"] for row in rows]
            axes.plot([min(whole), max(whole)], [place, place], color="#9db8d6", lw=3, solid_capstyle="round")
            axes.plot(whole, [place] * len(whole), "o", color="#1f5fa8", ms=5)
        axes.set_yticks(range(len(groups)), list(reversed(groups)))
        axes.grid(axis="x", color="#e6e6e6")
        axes.set_xlabel("whole answers equal to the teacher's, %; a dot is a seed")
        figure.savefig(path, dpi=130)


@click.command()
@click.option("--shards", required=True, help="Folder of logit shards.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSON file of what was measured.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG of the plot.")
@click.option("--layers", default=2, show_default=True)
@click.option("--width", default=128, show_default=True)
@click.option("--dropout", default=0.1, show_default=True)
@click.option("--epochs", default=3, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--jobs", default=os.cpu_count(), show_default="CPUs", help="Trainings side by side.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--close", default=1.0, show_default=True, help="Points of whole answers from the best that ask for more seeds.")
def main(shards: str, out: Path, plot: Path | None, jobs: int, seeds: int, close: float, **sizes: Any) -> None:
    """Compares the objectives."""
    student = {"layers": sizes["layers"], "width": sizes["width"], "heads": sizes["width"] // 32, "mlp": 4 * sizes["width"]}
    student["dropout"] = sizes["dropout"]
    shared = {"folder": shards, "student": student, "config": {key: sizes[key] for key in ("epochs", "batch_size")}}
    results = run([(name, 0) for name in CONTENDERS], jobs, out, **shared)
    more = [(name, seed) for seed in range(1, seeds) for name in close_ones(results, close)]
    results = run(more, jobs, out, **shared)
    show(results)
    if plot:
        draw(results, plot)


if __name__ == "__main__":
    main()
