"""How far a student and the floors agree on unseen comments, by the number of answers that they learn from.

All train on the same answers: the first N of one order. The student takes as many steps whatever N is, and its best epoch by
validation.
"""

from __future__ import annotations

from typing import Any

import click
import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.objectives import best_student, fidelity
from pipeline.shards.manifest import Shards, open_shards
from student.config import StudentConfig, TrainConfig
from student.data.answers import teacher_answers
from student.data.examples import open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION
from student.evaluate.floors import Labelled, linear_svm
from student.train.loop import Loop, Training


def student(shards: Shards, shape: StudentConfig, share: float, settings: dict[str, Any]) -> float:
    """Share of whole answers that a student trained on a share of the examples gives on the test split."""
    config = TrainConfig.model_validate(settings | {"growth": [share]})
    training = Training.of(shape, config, shards)
    return float(fidelity(best_student(training, Loop(training, shards)), shards.folder)["whole"])


@click.command()
@click.option("--shards", "folder", required=True, help="Folder of logit shards.")
@click.option("--answers", multiple=True, type=int, default=[80, 300, 1000, 3000, 10_000], show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--width", default=128, show_default=True)
@click.option("--steps", default=1500, show_default=True, help="Of each training.")
@click.option("--objective", default="curriculum", show_default=True)
def main(folder: str, answers: tuple[int, ...], layers: int, width: int, steps: int, objective: str) -> None:
    """Prints a row for each number of answers."""
    shards = open_shards(folder)
    train, test = (open_examples(shards, split, "choices") for split in (TRAIN, TEST))
    truth, known = teacher_answers(test), teacher_answers(train)
    shape = StudentConfig(layers=layers, width=width, heads=width // 32, mlp=4 * width, sequence="choices", dropout=0.1)
    batch = 32
    settings = {"epochs": max(1, round(steps / (len(train) // batch))), "batch_size": batch, "objective": objective}
    order = np.random.default_rng([0]).permutation(len(train))  # as a training of seed 0 draws its share
    unseen = [test.text(i) for i in range(len(test))]
    held = Labelled.of(open_examples(shards, VALIDATION, "choices"))
    table = Table("answers to learn from", "student", "linear SVM", box=MARKDOWN)
    for count in [n for n in answers if n <= len(train)]:
        given = Labelled([train.text(i) for i in order[:count]], [known[i] for i in order[:count]])
        floor = np.mean([a == b for a, b in zip(linear_svm(given, held, unseen), truth, strict=True)])
        shares = [student(shards, shape, count / len(train), settings), floor]
        table.add_row(f"{count:,}", *(f"{100 * share:.1f} %" for share in shares))
        Console().print(f"{count:,}: {shares}")
    Console(width=120).print(table)
    Console().print(f"on {len(test):,} unseen comments")


if __name__ == "__main__":
    main()
