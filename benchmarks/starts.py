"""How far students that start differently agree with their teacher, by the number of answers they learn from.

Each start is trained without Ray, by the product's own loop and defaults; floors are those of a report. `fine-tuned` is what
people would do by themselves: the reader with a classifier of whole answers on it, fine-tuned on the plain answers by the
Trainer of `transformers`, as many epochs of as large batches, the best of several learning rates. A student's epoch and the
peer's rate are picked by the validation split; the figures are of the test split.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.results import has, keep, load
from pipeline.base.plots import STYLE
from pipeline.shards.manifest import Shards, open_shards
from student.config import FloorsConfig, StudentConfig, TrainConfig, task_shape
from student.data.answers import teacher_answers
from student.data.examples import Examples, open_examples, student_examples
from student.data.unpack import TEST, TRAIN, VALIDATION
from student.evaluate.floors import fit_floors
from student.evaluate.speed import TIMED, WARM_UP, latency_ms
from student.train import loop as module
from student.train.loop import Loop, Training

BATCH = 128
STARTS = {
    "floors": "linear SVM",
    "ngrams": "`ngrams`",
    "own": "`own`",
    "pretrained": "MiniLM as the reader",
    "fine-tuned": "MiniLM, fine-tuned on the plain answers",
}
PEER_RATES = (5e-5, 1e-4, 3e-4)  # that the fine-tuned peer is tried with, the best by validation


@dataclass(frozen=True)
class Study:
    """What all starts learn from and are held against."""

    shards: Shards
    examples: int
    tested: int
    seed: int

    def split(self, name: str) -> Examples:
        """One split of the shards, cut to the study's size."""
        return open_examples(self.shards, name, "choices").first({TRAIN: self.examples, TEST: self.tested}.get(name))


def student(study: Study, reader: str, config: TrainConfig) -> dict[str, float]:
    """A student of the task's shape with some reader."""
    whole = module.student_examples
    module.student_examples = lambda shards, split, model: _first(whole(shards, split, model), study, split)
    try:
        shape: StudentConfig = task_shape(study.shards.compiled.task).model_copy(update={"reader": reader})
        loop = Loop(Training.of(shape, config.model_copy(update={"seed": study.seed}), study.shards), study.shards)
    finally:
        module.student_examples = whole
    model = loop._strategy._student
    test = student_examples(study.shards, TEST, model).first(study.tested)
    order = np.argsort(test.lengths, kind="stable")
    found = []
    for report in loop.run():
        if report.epoch_ended:
            parts = np.array_split(order, max(1, len(order) // BATCH))
            with loop.averaged():
                reached = loop._trainer.measure(test.batch(part) for part in parts)["answer_accuracy"]
            found.append((report.row["validation_answer_accuracy"], reached))
    return {"validation": max(found)[0], "test": max(found)[1], "ms": latency_ms(model.eval(), study.shards.compiled, test)}


def _first(examples: Examples, study: Study, split: str) -> Examples:
    return examples.first(study.examples) if split == TRAIN else examples


def fine_tuned(study: Study, folder: str, epochs: int) -> dict[str, float]:
    """The peer: plain answers as classes."""
    runs = [_fine_tuned(study, folder, epochs, rate) for rate in PEER_RATES]
    return max(runs, key=lambda run: run["validation"])


def _fine_tuned(study: Study, folder: str, epochs: int, rate: float) -> dict[str, float]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    splits = {name: study.split(name) for name in (TRAIN, VALIDATION, TEST)}
    answers = {name: teacher_answers(split) for name, split in splits.items()}
    classes = {values: i for i, values in enumerate(dict.fromkeys(answers[TRAIN]))}
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rows(name: str) -> list[dict[str, Any]]:
        texts = [splits[name].text(i) for i in range(len(splits[name]))]
        found = tokenizer(texts, truncation=True, max_length=512)["input_ids"]
        return [{"input_ids": ids, "label": classes.get(a, -1)} for ids, a in zip(found, answers[name], strict=True)]

    torch.manual_seed(study.seed)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=TrainConfig().with_batch(True).batch_size,
        per_device_eval_batch_size=BATCH,
        warmup_steps=0.05,  # a share
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=study.seed,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(classes), dtype=torch.float32)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(TRAIN), processing_class=tokenizer)
    trainer.train()

    def agreement(name: str) -> float:
        found = trainer.predict([row | {"label": max(row["label"], 0)} for row in rows(name)]).predictions.argmax(-1)
        return float(np.mean(found == [row["label"] for row in rows(name)]))

    @torch.inference_mode()
    def alone(i: int) -> None:
        model(**tokenizer(splits[TEST].text(i), truncation=True, max_length=512, return_tensors="pt"))

    return {"validation": agreement(VALIDATION), "test": agreement(TEST), "ms": _milliseconds(alone)}


def _milliseconds(answer: Callable[[int], None]) -> float:
    """Of one text alone, as `latency_ms` takes them."""
    times = []
    for i in range(WARM_UP + TIMED):
        started = time.perf_counter()
        answer(i)
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times[WARM_UP:]))


def run(study: Study, start: str, reader: str | None, epochs: int) -> dict[str, Any]:
    """One start's agreement, and the seconds it took."""
    began = time.perf_counter()
    if start == "floors":
        splits = {name: study.split(name) for name in (TRAIN, VALIDATION, TEST)}
        found = {name: floor["whole"] for name, floor in fit_floors(FloorsConfig(), study.shards, splits).items()}
    elif start == "fine-tuned":
        found = fine_tuned(study, str(reader), epochs)
    else:
        config = TrainConfig(log_every=10**6, epochs=epochs)
        found = student(study, str(reader) if start == "pretrained" else start, config)
    row = {"start": start, "examples": study.examples, "seed": study.seed, "seconds": time.perf_counter() - began, **found}
    print(row, file=sys.stderr, flush=True)
    return row


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR", help="An extraction, with at least so many training examples.")
@click.option("--reader", metavar="MODEL", help="A pretrained model, for `pretrained` and `fine-tuned`.")
@click.option("--examples", "counts", multiple=True, type=int, default=(1000, 4000), show_default=True)
@click.option("--start", "starts", type=click.Choice(list(STARTS)), multiple=True, default=list(STARTS), show_default=True)
@click.option("--epochs", default=TrainConfig().epochs, show_default=True, help="Of what is trained.")
@click.option("--tested", default=2000, show_default=True, help="Test comments.")
@click.option("--seeds", default=1, show_default=True)
@click.option("--keep", "name", default="starts", show_default=True, help="Name of the result.")
@click.option("--plot", "picture", metavar="PNG")
def main(
    shards: str,
    reader: str | None,
    counts: tuple[int, ...],
    starts: tuple[str, ...],
    name: str,
    picture: str | None,
    **how: int,
) -> None:
    """Trains every start at every size, prints the table, and draws all there is."""
    opened, tested = open_shards(shards), how["tested"]
    rows = load(name)["rows"] if has(name) else []  # what was found before stays: each row is minutes
    known = {(row["start"], row["examples"], row["seed"]) for row in rows}
    for count, start, seed in itertools.product(counts, starts, range(how["seeds"])):
        if (start, count, seed) not in known:
            rows.append(run(Study(opened, count, tested, seed), start, reader, how["epochs"]))
            keep(name, {"tested": tested, "rows": rows})
    table = Table("start", *(f"{count:,} answers" for count in counts), box=None)
    for start in starts:
        table.add_row(start, *(cell(rows, start, count) for count in counts))
    Console().print(table)
    if picture:
        plot(rows, picture)


def figures(rows: list[dict[str, Any]], start: str, count: int) -> list[float]:
    """Percent of whole answers of each seed."""
    mine = [row for row in rows if (row["start"], row["examples"]) == (start, count)]
    return [100 * (row["linear_svm"] if start == "floors" else row["test"]) for row in mine]


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Agreement against examples, and against the milliseconds of a text alone at the largest size of each start."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        by_examples, by_time = figure.subplots(1, 2, sharey=True)
        for place, (start, label) in enumerate(STARTS.items()):
            look = {"color": f"C{place}", "label": label.replace("`", "")}
            counts = sorted({row["examples"] for row in rows if row["start"] == start})
            found = [figures(rows, start, count) for count in counts]
            spreads = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in found]
            by_examples.errorbar(counts, [np.mean(v) for v in found], spreads, fmt="o-", ms=4, lw=1.2, capsize=2, **look)
            times = [row["ms"] for row in rows if (row["start"], row["examples"]) == (start, counts[-1]) and "ms" in row]
            if times:
                by_time.plot(np.median(times), np.mean(found[-1]), "o", **look)
        by_examples.set(xscale="log", xlabel="answers learnt from", ylabel="whole answers as the teacher's, %")
        counts = sorted({row["examples"] for row in rows})
        by_examples.set_xticks(counts, [f"{count:,}" for count in counts])
        by_examples.minorticks_off()
        by_time.set(xlim=(0, None), xlabel="milliseconds of a text alone, taught by the most answers")
        by_examples.legend(fontsize=8)
        figure.savefig(path, dpi=100)


def cell(rows: list[dict[str, Any]], start: str, count: int) -> str:
    """Their mean, with the spread of several seeds."""
    values = figures(rows, start, count)
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
