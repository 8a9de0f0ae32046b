"""Against people's labels: the student, the answers it learnt from, and those of them that a sure student contradicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, f1_score

from pipeline.task.task import Task
from pipeline.task.values import Values
from student.evaluate.fidelity import agreement, label_f1, label_matrices


def against_gold(
    task: Task, gold: list[Values | None], reference: list[Values], student: list[Values | None]
) -> dict[str, Any] | None:
    """How often each is right, by people's labels; None where there are none.

    Args:
        reference: the answers in the shards.

    Returns:
        `examples`, how many have labels; for `reference` and `student`, `whole` and by field in `fields`, the share that is
        right with its 95 % interval (Wilson, 1927); and for each field in `values`: `counts` of labels, `f1` of both by value,
        and the student's `confusion`, a row for each label, but for lists, which have `labels`, the F1 of each, instead; all in
        the order of `names`.
    """
    known = [i for i, label in enumerate(gold) if label is not None]
    if not known:
        return None
    labels = [label for label in gold if label is not None]
    answers: dict[str, list[Values | None]] = {
        "reference": [reference[i] for i in known],
        "student": [student[i] for i in known],
    }
    return {
        "examples": len(known),
        **{who: _right(agreement(task, labels, some), len(known)) for who, some in answers.items()},
        "values": {
            name: {"names": task.fields[name]}
            | _by_value(
                [place(label) for label in labels],
                {who: [place(answer) for answer in some] for who, some in answers.items()},
                count,
            )
            for name, place, count in _fields(task)
        }
        | {name: {"names": task.fields[name]} | _by_label(task, name, labels, answers) for name in task.lists},
    }


def _right(shares: dict[str, Any], count: int) -> dict[str, Any]:
    """Shares of so many answers, each with the ends of its interval."""

    def interval(share: float) -> list[float]:
        ends = binomtest(round(share * count), count).proportion_ci(method="wilson")
        return [share, float(ends.low), float(ends.high)]

    return {"whole": interval(shares["whole"]), "fields": {name: interval(share) for name, share in shares["fields"].items()}}


def _by_value(labels: list[int], found: dict[str, list[int]], count: int) -> dict[str, Any]:
    """How often each of `count` values is a label, how well it is found, and what the student takes it for."""
    every = list(range(count))
    return {
        "counts": np.bincount(labels, minlength=count).tolist(),
        "f1": {
            who: f1_score(labels, mine, labels=every, average=None, zero_division=0).tolist() for who, mine in found.items()
        },
        "confusion": confusion_matrix(labels, found["student"], labels=every).tolist(),
    }


def _by_label(task: Task, name: str, labels: list[Values], answers: dict[str, list[Values | None]]) -> dict[str, Any]:
    """How often each label is in a list, and how well it is found."""
    found = {who: label_matrices(task, name, labels, some) for who, some in answers.items()}
    return {
        "counts": found["student"][0].sum(0).tolist(),
        "f1": {who: f1_score(*some, average=None, zero_division=0).tolist() for who, some in found.items()},
        "labels": {who: label_f1(*some) for who, some in found.items()},
        "confusion": None,
    }


def _fields(task: Task) -> Iterator[tuple[str, Callable[[Values | None], int], int]]:
    """Each field's name, a function for which of its values an answer has (-1 for no answer), and how many there are."""
    for i, (name, values) in enumerate(task.fields.items()):
        if name in task.lists:
            continue
        places = {(type(value), value): place for place, value in enumerate(values)}

        def place(answer: Values | None, i: int = i, places: dict[Any, int] = places) -> int:
            return -1 if answer is None else places[type(answer[i]), answer[i]]

        yield name, place, len(values)


def suspects(
    task: Task,
    text: Callable[[int], str],
    gold: list[Values | None],
    reference: list[Values],
    student: list[Values | None],
    confidence: NDArray[np.float64],
) -> Iterator[dict[str, Any]]:
    """The texts that the student answers otherwise, the surest first: where the answers in the shards may be wrong.

    Args:
        text: reads one, by its number.
    """
    names = list(task.fields)
    for i in np.argsort(-confidence, kind="stable"):
        if student[i] is not None and student[i] != reference[i]:
            answers = (("student", student[i]), ("answer", reference[i]), ("gold", gold[i]))
            said = {who: dict(zip(names, answer, strict=True)) for who, answer in answers if answer is not None}
            yield {"text": text(i), "confidence": round(float(confidence[i]), 4)} | said
