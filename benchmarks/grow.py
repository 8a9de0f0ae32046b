"""Agreement and certified coverage by the answers asked for: texts that `retort grow` would choose, against random ones.

A replay: every answer of an extraction is known, and a text counts as asked when it is chosen. Each round trains a student of
the product's defaults on all texts asked so far, without Ray. Agreement is of the whole test split; a certificate is made from
as many validation and test texts as that number of calls would hold. `needed` is the share of the calls after which the chosen
texts have what random ones have with all of them, between two rounds by a straight line.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.results import has, keep, load
from pipeline.shards.manifest import Shards, open_shards
from student.config import StudentConfig, TrainConfig, task_shape
from student.data.answers import parse_all, teacher_answers
from student.data.examples import Examples, _ranges, student_examples
from student.data.unpack import TEST, TRAIN, VALIDATION
from student.decode.answerer import WHOLE
from student.decode.decode import Decoder
from student.evaluate.calibrate import fit_temperatures
from student.evaluate.certificate import certify
from student.evaluate.evidence import KnownAnswers
from student.model.model import Student
from student.train import loop as module
from student.train.loop import Loop, Training
from tune.config import GrowConfig
from tune.grow.select import draw_unsure, next_size

BATCH = 256
WAYS = ("random", "chosen")
GROUPS = {
    "text_starts": ["text"],
    "comment_starts": ["comment"],
    "answer_starts": ["answer", "state", "kept"],
    "gold_starts": ["gold"],
    "choice_starts": [],
}


def take(examples: Examples, rows: NDArray[np.int64]) -> Examples:
    """Some of the examples, as if there were no others."""
    columns = {}
    for starts, names in {**GROUPS, "kept_starts": []}.items():
        lengths = np.diff(examples.columns[starts])[rows]
        columns[starts] = np.concatenate([[0], np.cumsum(lengths)])
        places = _ranges(examples.columns[starts][rows], lengths)
        columns |= {name: examples.columns[name][places] for name in names}
        if starts == "kept_starts":
            stored = replace(examples.stored, values=examples.stored.values[places], lse=examples.stored.lse[places])
    return replace(examples, columns=columns, stored=stored)


def trained(shards: Shards, splits: dict[str, Examples], reader: str, seed: int) -> Student:
    """The best epoch's student of these splits."""
    whole = module.student_examples
    module.student_examples = lambda _shards, split, _model: splits[split]
    try:
        shape: StudentConfig = task_shape(shards.compiled.task).model_copy(update={"reader": reader})
        loop = Loop(Training.of(shape, TrainConfig(log_every=10**6, seed=seed), shards), shards)
    finally:
        module.student_examples = whole
    best, state = -1.0, {}
    for report in loop.run():
        if report.epoch_ended and report.row["validation_answer_accuracy"] > best:
            best = report.row["validation_answer_accuracy"]
            with loop.averaged():
                state = {name: value.clone() for name, value in loop._strategy._student.state_dict().items()}
    model = loop._strategy._student
    model.load_state_dict(state)
    return model.eval()


def decode(decoder: Decoder, examples: Examples) -> tuple[list[list[int]], NDArray[np.float64]]:
    """The answers' tokens, and their confidence by field."""
    parts = [
        decoder.constrained([examples.prefix(i) for i in range(start, min(start + BATCH, len(examples)))])
        for start in range(0, len(examples), BATCH)
    ]
    return [tokens for part in parts for tokens in part.tokens], np.concatenate([part.by_field for part in parts])


def replay(shards: Shards, reader: str, way: str, seed: int, agree: float, calls: int) -> list[dict[str, Any]]:
    """The rounds of one run."""
    shape: StudentConfig = task_shape(shards.compiled.task).model_copy(update={"reader": reader})
    model = Training.of(shape, TrainConfig(), shards).student()
    splits = {split: student_examples(shards, split, model) for split in (TRAIN, VALIDATION, TEST)}
    rng = np.random.default_rng(seed)
    order = {split: rng.permutation(len(examples)) for split, examples in splits.items()}
    asked, rows, decoder = order[TRAIN][:0], [], None
    config, count = GrowConfig(calls=calls), 0
    while (more := next_size(count, config, shards.manifest.rows)) > count:
        count = more
        train_count = min(round(0.8 * count), len(splits[TRAIN]))
        rest = np.setdiff1d(order[TRAIN], asked, assume_unique=True)
        if decoder is None or way == "random":
            new = rng.permutation(rest)[: train_count - len(asked)]
        else:
            _, by_field = decode(decoder, take(splits[TRAIN], rest))
            new = rest[draw_unsure(by_field.prod(1), train_count - len(asked), rng)]
        asked = np.concatenate([asked, new])
        held = {split: take(splits[split], np.sort(order[split][: round(0.1 * count)])) for split in (VALIDATION, TEST)}
        began = time.perf_counter()
        model = trained(shards, {TRAIN: take(splits[TRAIN], np.sort(asked)), VALIDATION: held[VALIDATION]}, reader, seed)
        batches = held[VALIDATION].batches(np.arange(len(held[VALIDATION])), 128)
        decoder = Decoder(model, shards.compiled, fit_temperatures(model, shards.compiled, batches))
        known = {}
        for name, part in {"chooses": held[VALIDATION], "tests": held[TEST], "all": splits[TEST]}.items():
            tokens, by_field = decode(decoder, part)
            truth, said = teacher_answers(part), parse_all(shards.compiled, tokens)
            known[name] = KnownAnswers.of(truth, said, by_field)
            reached = float(np.mean([a == b for a, b in zip(truth, said, strict=True)]))
        fields = list(shards.compiled.task.fields)
        found = certify({WHOLE: agree}, known["chooses"].evidence(fields), known["tests"].evidence(fields))
        row = {"way": way, "seed": seed, "calls": count, "agreement": reached, "seconds": time.perf_counter() - began}
        rows.append(row | {"coverage": found.alone / found.texts if found else 0.0})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def needed(chosen: list[dict[str, Any]], reached: float) -> float | None:
    """The calls after which the chosen have it."""
    before = {"calls": 0, "agreement": 0.0}
    for row in chosen:
        if row["agreement"] >= reached:
            share = (reached - before["agreement"]) / (row["agreement"] - before["agreement"])
            return before["calls"] + share * (row["calls"] - before["calls"])
        before = row
    return None


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR")
@click.option("--reader", default="own", show_default=True, help="Of the students.")
@click.option("--calls", type=int, help="At most; by default all texts.")
@click.option("--agree", default=0.9, show_default=True, help="What is certified.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--way", "ways", type=click.Choice(WAYS), multiple=True, default=WAYS, show_default=True)
@click.option("--keep", "name", default="grow", show_default=True, help="Name of the result.")
def main(shards: str, reader: str, calls: int | None, agree: float, seeds: int, ways: tuple[str, ...], name: str) -> None:
    """Replays what is not known yet, and prints the table."""
    opened = open_shards(shards)
    calls = calls or opened.manifest.rows
    rows = load(name)["rows"] if has(name) else []
    for seed in range(seeds):
        for way in ways:
            if not any((row["way"], row["seed"]) == (way, seed) for row in rows):
                rows += replay(opened, reader, way, seed, agree, calls)
                keep(name, {"reader": reader, "agree": agree, "rows": rows})
    table = Table("calls", *ways, box=None)
    for count in sorted({row["calls"] for row in rows}):
        cells = [[r for r in rows if (r["way"], r["calls"]) == (way, count)] for way in ways]
        table.add_row(f"{count:,}", *(_cell(some) for some in cells))
    Console().print(table)
    for seed in range(seeds if set(ways) == set(WAYS) else 0):
        random, chosen = ([row for row in rows if (row["way"], row["seed"]) == (way, seed)] for way in WAYS)
        there = needed(chosen, random[-1]["agreement"])
        Console().print(f"seed {seed}: {'never' if there is None else f'{there / calls:.0%} of the calls'}")


def _cell(rows: list[dict[str, Any]]) -> str:
    return " ".join(f"{100 * np.mean([row[name] for row in rows]):.1f}" for name in ("agreement", "coverage")) if rows else "-"


if __name__ == "__main__":
    main()
