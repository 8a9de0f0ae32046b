"""What pruning the thesis' student takes: 202 M parameters and 268 M of the embedding, random weights, real examples.

Time is given beside that of plain forward passes over the same examples, memory beside that of the weights.
"""

from __future__ import annotations

import time
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.results import keep
from benchmarks.students import peak_gib
from pipeline.shards.manifest import open_shards
from student.config import THESIS, PruneConfig
from student.data.examples import Examples, open_examples
from student.data.unpack import TRAIN
from student.model.model import Student
from student.model.shape import Shape
from student.prune.cut import choose, cut
from student.prune.importance import LEAVE_OUT, importance, measure
from student.prune.sizes import target_sizes

VOCABULARY, BATCH = 262_144, 32


@torch.inference_mode()
def forward(student: Student, examples: Examples, chosen: Any) -> float:
    """Seconds of plain forward passes."""
    started = time.perf_counter()
    for start in range(0, len(chosen), BATCH):
        student(examples.batch(chosen[start : start + BATCH]).tokens)
    return time.perf_counter() - started


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR")
@click.option("--examples", "count", default=1024, show_default=True)
@click.option("--fraction", default=0.5, show_default=True)
def main(shards: str, count: int, fraction: float) -> None:
    """Measures, prints the table and writes it."""
    opened, config = open_shards(shards), THESIS
    compiled = opened.compiled
    shape = Shape(VOCABULARY, VOCABULARY, compiled.watched.size, compiled.context, **config.sizes())
    student = Student(shape, np.arange(VOCABULARY, dtype=np.int32)).eval()
    weights = 4 * sum(student.parameter_counts().values()) / 2**30
    examples = open_examples(opened, TRAIN, shape.sequence)
    chosen = np.linspace(0, len(examples) - 1, count).astype(np.int64)
    plain, marks = forward(student, examples, chosen), [time.perf_counter()]
    sums = measure(student, examples, chosen, LEAVE_OUT, BATCH)
    marks.append(time.perf_counter())
    scores, sizes = importance([sums], shape.layers), target_sizes(PruneConfig(fraction=fraction), shape)
    smaller = cut(student, choose(scores, shape, sizes))
    marks.append(time.perf_counter())
    results = {
        "parameters": student.parameter_counts(),
        "pruned": smaller.parameter_counts(),
        "examples": count,
        "left_out_for": min(LEAVE_OUT, count),
        "forward_seconds": plain,
        "scoring_seconds": marks[1] - marks[0],
        "scoring_to_forward": (marks[1] - marks[0]) / plain,
        "cutting_seconds": marks[2] - marks[1],
        "weights_gib": weights,
        "peak_gib": peak_gib(torch.device("cpu")),
        "peak_to_weights": peak_gib(torch.device("cpu")) / weights,
    }
    keep("prune_true_size", results)
    table = Table("", "")
    for name, value in results.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
