"""How well strange texts are told from those that a student was trained on: by its confidence, by n-grams, and by both.

The held-out texts are the test split's. A score is the better, the more strange texts are among its lowest: the area under its
ROC curve, and the share of strange texts that go to the teacher where it takes 5 % of the validation split's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks.results import keep
from pipeline.comments.reading import KEPT, Columns, filter_rows, read_file, text_row
from pipeline.shards.manifest import open_shards
from student.data.examples import open_examples
from student.data.unpack import TEST, VALIDATION
from student.decode.answerer import Answerer
from student.decode.familiarity import Familiarity

SHARE = 0.05
Scores = dict[str, NDArray[np.float64]]


def scores(answerer: Answerer, familiarity: Familiarity, texts: list[str]) -> Scores:
    """Of each text, by name; the lower, the stranger."""
    task, tokenizer = answerer.compiled.task, answerer.compiled.tokenizer
    rows = filter_rows([text_row(i, text) for i, text in enumerate(texts)], task.comments, tokenizer)
    rows = [row for row in rows if row.status == KEPT]
    confidence = np.array([answer.confidence for answer in answerer.answer(rows)])
    kept = [row.text for row in rows]
    unknown = familiarity.of(kept, np.ones(len(kept)))  # sure of all alike
    return {"confidence": confidence, "n-grams": unknown, "both": familiarity.of(kept, confidence)}


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR")
@click.option("--student", required=True, metavar="DIR", help="Trained on these shards, and evaluated.")
@click.option("--strange", required=True, multiple=True, metavar="NAME=FILE", help="Texts of another kind.")
@click.option("--text", default="body", show_default=True, help="Their column.")
@click.option("--keep", "name", default="unfamiliar", show_default=True, help="Name of the result.")
def main(shards: str, student: str, strange: tuple[str, ...], text: str, name: str) -> None:
    """Prints and keeps the table."""
    opened, answerer, familiarity = open_shards(shards), Answerer.load(student), Familiarity.load(student)
    splits = {split: open_examples(opened, split, "choices") for split in (VALIDATION, TEST)}
    known = {split: [found.text(i) for i in range(len(found))] for split, found in splits.items()}
    validation, test = (scores(answerer, familiarity, known[split]) for split in (VALIDATION, TEST))
    rows: list[dict[str, Any]] = []
    for entry in strange:
        kind, _, path = entry.partition("=")
        texts = [row.text for row in read_file(path, Columns(text, "id")) if row.status == KEPT]
        for score, found in scores(answerer, familiarity, texts).items():
            least = np.quantile(validation[score], SHARE)
            strangers = np.r_[np.zeros(len(test[score])), np.ones(len(found))]
            area = float(roc_auc_score(strangers, -np.r_[test[score], found]))
            deferred = {"strange": float(np.mean(found < least)), "familiar": float(np.mean(test[score] < least))}
            rows.append({"texts": kind, "count": len(found), "score": score, "auroc": area, "deferred": deferred})
    keep(name, {"student": Path(student).parent.name, "rows": rows})
    table = Table("texts", "score", "AUROC", "deferred", "of test texts", box=None)
    for row in rows:
        shares = (f"{row['deferred'][kind]:.1%}" for kind in ("strange", "familiar"))
        table.add_row(row["texts"], row["score"], f"{row['auroc']:.3f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
