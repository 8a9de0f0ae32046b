"""Lists of labels: students and a linear SVM for each label, against the answers that a log holds, by F1.

Both learn from the training split. Each is scored as it answers by itself, and with a threshold for each label's share, or the
SVM's distance, that gives the label the best F1 on validation texts. The figures are of the test split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import precision_recall_curve
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_union
from sklearn.svm import LinearSVC

from benchmarks.results import keep
from pipeline.comments.reading import filter_rows, text_row
from pipeline.shards.manifest import open_shards
from pipeline.task.task import Task
from student.data.answers import teacher_answers
from student.data.examples import Examples, open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION
from student.decode.answerer import Answerer
from student.evaluate.fidelity import label_f1, label_matrices
from student.evaluate.floors import Labelled, linear_svm

STRENGTHS = (0.1, 0.3, 1.0)

Flags = NDArray[np.bool_]
Scores = NDArray[np.float64]


def cuts(sure_NL: Scores, told_NL: Flags) -> Scores:
    """For each label the score from which on it is to be in a list, by the best F1; not the least of all: that is always."""
    found = []
    for sure_N, told_N in zip(sure_NL.T, told_NL.T, strict=True):
        precision, recall, thresholds = precision_recall_curve(told_N, sure_N)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        found.append(thresholds[1:][np.argmax(f1[1:-1])] if len(thresholds) > 1 else np.inf)  # as unlikely everywhere
    return np.array(found)


def above(sure_NL: Scores, cuts_L: Scores) -> Flags:
    """The labels from their cut on; of none, the one that is nearest to it."""
    flags = sure_NL >= cuts_L
    flags[np.arange(len(flags)), (sure_NL - cuts_L).argmax(1)] |= ~flags.any(1)
    return flags


def row(who: str, told_NL: Flags, said_NL: Flags) -> dict[str, Any]:
    """Both F1 and the share of lists that are right as a whole."""
    return {"who": who, "whole": float((told_NL == said_NL).all(1).mean())} | label_f1(told_NL, said_NL)


def of_student(
    folder: str, task: Task, name: str, parts: dict[str, Examples], told: dict[str, Flags]
) -> Iterator[dict[str, Any]]:
    """A student's."""
    answerer, shares, said = Answerer.load(folder), {}, {}
    for split in (VALIDATION, TEST):
        texts = [parts[split].text(i) for i in range(len(parts[split]))]
        kept = filter_rows([text_row(i, text) for i, text in enumerate(texts)], task.comments, answerer.compiled.tokenizer)
        answers = answerer.answer(kept, value_probabilities=True)
        shares[split] = np.array([(answer.value_probabilities or {})[name] for answer in answers])
        values = [tuple(answer.values.values()) for answer in answers]
        said[split] = label_matrices(task, name, values, list(values))[0]
    yield row("student", told[TEST], said[TEST])
    yield row(
        "student, a threshold for each label", told[TEST], above(shares[TEST], cuts(shares[VALIDATION], told[VALIDATION]))
    )


def of_svm(task: Task, name: str, parts: dict[str, Labelled], told: dict[str, Flags]) -> Iterator[dict[str, Any]]:
    """A linear SVM's for each label: the report's floor, and with thresholds."""
    whole = linear_svm(parts[TRAIN], parts[VALIDATION], parts[TEST].rows)
    yield row("linear SVM for each label", told[TEST], label_matrices(task, name, whole, list(whole))[0])
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features = make_union(words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True))
    train, held, test = (
        features.fit_transform(parts[TRAIN].rows),
        *(features.transform(parts[s].rows) for s in (VALIDATION, TEST)),
    )
    found = []
    for strength in STRENGTHS:
        model = OneVsRestClassifier(LinearSVC(C=strength)).fit(train, told[TRAIN])
        sure = model.decision_function(held)
        at = cuts(sure, told[VALIDATION])
        found.append((label_f1(told[VALIDATION], above(sure, at))["macro"], above(model.decision_function(test), at)))
    yield row("linear SVM, a threshold for each label", told[TEST], max(found, key=lambda pair: pair[0])[1])


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR")
@click.option("--student", "students", required=True, multiple=True, metavar="NAME=DIR", help="Trained on these shards.")
@click.option("--field", required=True, help="That is a list.")
def main(shards: str, students: tuple[str, ...], field: str) -> None:
    """Prints and keeps the table."""
    opened = open_shards(shards)
    task, splits = opened.compiled.task, (TRAIN, VALIDATION, TEST)
    examples = {split: open_examples(opened, split, "choices") for split in splits}
    answers = {split: teacher_answers(examples[split]) for split in splits}
    told = {split: label_matrices(task, field, some, list(some))[0] for split, some in answers.items()}
    rows = list(of_svm(task, field, {split: Labelled.of(examples[split]) for split in splits}, told))
    for named in students:
        name, _, folder = named.partition("=")
        found = of_student(folder, task, field, examples, told)
        rows += [one | {"who": one["who"].replace("student", name)} for one in found]
    keep("lists", {"examples": len(answers[TRAIN]), "tested": len(answers[TEST]), "rows": rows})
    table = Table("", "lists", "F1, micro", "macro", box=None)
    for one in rows:
        table.add_row(one["who"], f"{one['whole']:.1%}", f"{one['micro']:.3f}", f"{one['macro']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
