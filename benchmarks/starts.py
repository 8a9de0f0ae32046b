"""How far students that start differently agree with their teacher, by the number of answers they learn from.

Each start is trained without Ray, by the product's own loop and defaults; floors are those of a report. `fine-tuned` is what
people would do by themselves: the reader with a classifier of whole answers on it, fine-tuned on the plain answers by the
Trainer of `transformers`, as many epochs of as large batches, the best of several learning rates, which is searched at small
sizes and with the first seed. Epochs are as many as `retort run`'s ladder gives a rung. A student's epoch and the peer's rate
are picked by the validation split, an eighth as large as what is learnt from; the figures are of the test split.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterable
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
from student.evaluate.speed import latency_ms, median_ms
from student.model.model import Student
from student.train import loop as module
from student.train.loop import Loop, Training
from student.train.strategy import fast_bf16
from tune.config import LadderConfig
from tune.search.ladder import PROBE

BATCH = 128
STARTS = {
    "floors": "linear SVM",
    "ngrams": "`ngrams`",
    "own": "`own`",
    "pretrained": "MiniLM as the reader",
    "fine-tuned": "MiniLM, fine-tuned on the plain answers",
}
PEER_RATES = (5e-5, 1e-4, 3e-4)  # that the fine-tuned peer is tried with, the best by validation
SEARCHED = 4000  # examples up to which all rates are tried


@dataclass(frozen=True)
class Study:
    """What all starts learn from and are held against."""

    shards: Shards
    examples: int
    tested: int
    seed: int
    epochs: int
    minutes: float

    def split(self, name: str) -> Examples:
        """One split of the shards, cut to the study's size."""
        return open_examples(self.shards, name, "choices").first(self.sizes[name])

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each split."""
        return {TRAIN: self.examples, VALIDATION: self.examples // 8, TEST: self.tested}


def student(study: Study, reader: str) -> dict[str, float]:
    """A student of the task's shape with some reader."""
    probe, _ = _loop(study, reader, study.epochs)
    fit = int(60 * study.minutes / probe.seconds_an_epoch(PROBE))
    epochs = min(study.epochs, max(1, fit))
    loop, model = _loop(study, reader, epochs)
    test = student_examples(study.shards, TEST, model).first(study.tested)
    parts = np.array_split(np.argsort(test.lengths, kind="stable"), max(1, len(test) // BATCH))
    best = {"validation": -1.0}
    for report in loop.run():
        if report.epoch_ended and report.row["validation_answer_accuracy"] > best["validation"]:
            with loop.averaged():
                reached = loop._trainer.measure(test.batch(part) for part in parts)["answer_accuracy"]
            best = {"validation": report.row["validation_answer_accuracy"], "test": reached}
    return best | {"ms": latency_ms(model.eval(), study.shards.compiled, test), "epochs": epochs}


def _loop(study: Study, reader: str, epochs: int) -> tuple[Loop, Student]:
    """A training of the first examples, and its student."""
    whole = module.student_examples
    module.student_examples = lambda shards, split, model: whole(shards, split, model).first(study.sizes[split])
    try:
        shape: StudentConfig = task_shape(study.shards.compiled.task).model_copy(update={"reader": reader})
        config = TrainConfig(log_every=10**6, epochs=epochs, seed=study.seed)
        loop = Loop(Training.of(shape, config, study.shards), study.shards)
    finally:
        module.student_examples = whole
    return loop, loop._strategy._student


def fine_tuned(study: Study, folder: str, epochs: int, rates: Iterable[float]) -> dict[str, float]:
    """The peer: plain answers as classes."""
    runs = [_fine_tuned(study, folder, epochs, rate) | {"rate": rate, "epochs": epochs} for rate in rates]
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
        bf16=fast_bf16("cuda" if torch.cuda.is_available() else "cpu"),
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

    return {"validation": agreement(VALIDATION), "test": agreement(TEST), "ms": median_ms(alone)}


def run(study: Study, start: str, reader: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One start's agreement, and the seconds it took.

    Args:
        rows: of the starts before it: the peer has the epochs of the student with the same model.
    """
    began = time.perf_counter()
    before = {(row["start"], row["seed"]): row for row in rows if row["examples"] == study.examples}
    if start == "floors":
        splits = {name: study.split(name) for name in (TRAIN, VALIDATION, TEST)}
        found = {name: floor["whole"] for name, floor in fit_floors(FloorsConfig(), study.shards, splits).items()}
    elif start == "fine-tuned":
        epochs = before["pretrained", 0]["epochs"]
        known = [row for row in rows if row["start"] == start]
        rates = [known[-1]["rate"]] if study.seed or study.examples > SEARCHED else PEER_RATES
        found = fine_tuned(study, str(reader), epochs, rates)
    else:
        found = student(study, str(reader) if start == "pretrained" else start)
    row = {"start": start, "examples": study.examples, "seed": study.seed, "seconds": time.perf_counter() - began, **found}
    print(row, file=sys.stderr, flush=True)
    return row


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR", help="An extraction, with at least so many training examples.")
@click.option("--reader", metavar="MODEL", help="A pretrained model, for `pretrained` and `fine-tuned`.")
@click.option("--examples", "counts", multiple=True, type=int, default=(1000, 4000), show_default=True)
@click.option("--start", "starts", type=click.Choice(list(STARTS)), multiple=True, default=list(STARTS), show_default=True)
@click.option("--epochs", default=TrainConfig().epochs, show_default=True, help="Of what is trained, at most.")
@click.option("--minutes", default=LadderConfig().minutes, show_default=True, help="Of a student's training, as a rung's.")
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
    **how: Any,
) -> None:
    """Trains every start at every size, prints the table, and draws all there is."""
    opened, tested = open_shards(shards), how["tested"]
    learnt = len(open_examples(opened, TRAIN, "choices"))
    counts = tuple(min(count, learnt) for count in counts)
    rows = load(name)["rows"] if has(name) else []  # what was found before stays: each row is minutes
    known = {(row["start"], row["examples"], row["seed"]) for row in rows}
    for count, start, seed in itertools.product(counts, starts, range(how["seeds"])):
        if (start, count, seed) not in known:
            rows.append(run(Study(opened, count, tested, seed, how["epochs"], how["minutes"]), start, reader, rows))
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
