"""Measures of fidelity: how closely a student follows its teacher. Pure functions of answers and logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from pipeline.task.compiled import CompiledTask
from pipeline.task.task import Task
from pipeline.task.values import Values, labels_of
from student.data.examples import Batch
from student.model.model import Student
from student.train.losses import forward_kl

BINS = 10
CLOSE = 0.01  # nats
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def agreement(task: Task, teacher: list[Values], other: list[Values | None]) -> dict[str, Any]:
    """Share of answers that are valid, that equal the teacher's as a whole, and by field; None counts as wrong.

    Where fields are lists, `labels` has their F1 by name, see `label_f1`.
    """
    pairs = list(zip(teacher, other, strict=True))
    fields = {
        name: _mean(answer is not None and answer[i] == true[i] for true, answer in pairs) for i, name in enumerate(task.fields)
    }
    labels = {name: label_f1(*label_matrices(task, name, teacher, other)) for name in task.lists}
    return {
        "valid": _mean(answer is not None for answer in other),
        "whole": _mean(matches(teacher, other)),
        "fields": fields,
    } | ({"labels": labels} if labels else {})


def label_matrices(
    task: Task, name: str, teacher: list[Values], other: list[Values | None]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which labels are in the lists of one field of some answers: bool [N, labels] each; none where there is no answer."""
    field, allowed = list(task.fields).index(name), task.fields[name]

    def row(answer: Values | None) -> list[bool]:
        labels = [] if answer is None else list(map(repr, labels_of(answer[field])))  # JSON tells true from 1
        return [repr(label) in labels for label in allowed]

    return np.array([row(answer) for answer in teacher]), np.array([row(answer) for answer in other])


def label_f1(teacher_NL: NDArray[np.bool_], other_NL: NDArray[np.bool_]) -> dict[str, float]:
    """F1 of lists: `micro` over all labels of all texts, `macro` the mean of the labels' own, of those that were given."""
    each_L = f1_score(teacher_NL, other_NL, average=None, zero_division=0)
    given_L = teacher_NL.any(0)
    return {
        "micro": float(f1_score(teacher_NL, other_NL, average="micro", zero_division=0)),
        "macro": float(np.asarray(each_L)[given_L].mean()) if given_L.any() else 0.0,
    }


def matches(teacher: list[Values], other: list[Values | None]) -> NDArray[np.float64]:
    """Which answers equal the teacher's as a whole: [N], 1 or 0."""
    return np.array([answer == true for true, answer in zip(teacher, other, strict=True)], np.float64)


def trust(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> dict[str, Any]:
    """What a student's confidence in whole answers is worth, and what a threshold for it would give.

    Args:
        confidence: [N].
        right: [N], 1 where the answer is the teacher's.

    Returns:
        `ece` and `bins`, see `calibration`; `thresholds`: for each, the share of comments with at least this confidence, and
        the share of these that are answered as the teacher does, None where there is none.
    """
    rows = []
    for threshold in THRESHOLDS:
        sure = confidence >= threshold
        rows.append({"confidence": threshold, "share": _mean(sure), "whole": float(right[sure].mean()) if sure.any() else None})
    return calibration(confidence, right) | {"thresholds": rows}


def _mean(flags: Iterable[bool]) -> float:
    return float(np.mean(list(flags)))


@torch.inference_mode()
def step_sums(model: Student, batches: Iterable[Batch]) -> NDArray[np.float64]:
    """Sums over teacher-forced steps, which add up over parts of a split: float64 [2 + BINS, 3].

    Returns:
        For all steps, and then for the choice steps: how many, in how many of them the student's likeliest watched token is
        the teacher's, and KL(p_t ‖ p_s) over W, in nats; then `_binned` of the choice steps.
    """
    device = next(model.parameters()).device
    columns: list[list[NDArray[np.float64]]] = []
    for batch in batches:
        logits_MW = model(*batch.to(device).inputs).float().cpu()[:, : batch.teacher.shape[1]]
        best = logits_MW.softmax(-1).max(-1)
        measured = (
            best.indices == batch.targets,
            best.values,
            forward_kl(batch.teacher.float().log_softmax(-1), logits_MW.log_softmax(-1)),
            batch.choice,
        )
        columns.append([column.double().numpy() for column in measured])
    right, confidence, kl, choice = (np.concatenate(column) for column in zip(*columns, strict=True))
    at_choice = choice > 0
    sums = [[some.sum(), right[some].sum(), kl[some].sum()] for some in (np.ones_like(at_choice), at_choice)]
    return np.vstack([sums, _binned(confidence[at_choice], right[at_choice])])


def step_measures(sums: NDArray[np.float64]) -> dict[str, Any]:
    """What `step_sums` come to.

    Returns:
        `accuracy`, `choice_accuracy`: share of steps where the student's likeliest watched token is the teacher's;
        `kl`, `choice_kl`: mean KL(p_t ‖ p_s) over W, in nats; `calibration`: of the choice steps, see `calibration`.
    """
    (steps, right, kl), (choices, choice_right, choice_kl) = sums[:2].tolist()
    return {
        "steps": int(steps),
        "choices": int(choices),
        "accuracy": right / steps,
        "choice_accuracy": choice_right / choices if choices else 1.0,
        "kl": kl / steps,
        "choice_kl": choice_kl / choices if choices else 0.0,
        "calibration": _calibration(sums[2:]),
    }


def close_answers(compiled: CompiledTask, batches: Iterable[Batch]) -> int:
    """How many of the teacher's answers have a choice whose two likeliest allowed tokens are less than `CLOSE` nats apart.

    Another device or another batch may answer these otherwise, so no student can be asked for more than the rest.
    """
    allowed_SR, close = torch.from_numpy(compiled.automaton.allowed), 0
    for batch in batches:
        allowed_MR = allowed_SR[batch.state[batch.choice]]  # the required tokens come first among the watched
        required_MR = batch.teacher[batch.choice, : allowed_MR.shape[1]].float()
        likely_M2 = required_MR.where(allowed_MR, -torch.inf).topk(2).values
        example_M = batch.predict[batch.choice] // batch.tokens.shape[1]
        near_B = torch.zeros(len(batch.tokens), dtype=torch.bool)
        near_B[example_M[likely_M2[:, 0] - likely_M2[:, 1] < CLOSE]] = True
        close += int(near_B.sum())
    return close


def calibration(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> dict[str, Any]:
    """Expected calibration error over equal-width bins (Guo et al., 2017), and the bins.

    Args:
        confidence: [M], probability of the token chosen.
        right: [M], 1 where it is the teacher's.
    """
    return _calibration(_binned(confidence, right))


def _binned(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """By bin of confidence: how many, their confidence and how many are right, summed: float64 [BINS, 3]."""
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    inside = [index == i for i in range(BINS)]
    return np.array([[some.sum(), confidence[some].sum(), right[some].sum()] for some in inside])


def _calibration(bins: NDArray[np.float64]) -> dict[str, Any]:
    rows = [{"count": int(n), "confidence": sure / n, "accuracy": right / n} for n, sure, right in bins.tolist() if n]
    gaps = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows]
    return {"ece": float(sum(gaps) / max(1, bins[:, 0].sum())), "bins": rows}
