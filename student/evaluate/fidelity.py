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
def step_measures(model: Student, batches: Iterable[Batch]) -> dict[str, Any]:
    """Accuracy, KL and calibration over teacher-forced steps.

    Returns:
        `accuracy`, `choice_accuracy`: share of steps where the student's likeliest watched token is the teacher's;
        `kl`, `choice_kl`: mean KL(p_t ‖ p_s) over W, in nats; `calibration`: of the choice steps, see `calibration`.
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
    return {
        "steps": len(right),
        "choices": int(at_choice.sum()),
        "accuracy": float(right.mean()),
        "choice_accuracy": float(right[at_choice].mean()) if at_choice.any() else 1.0,
        "kl": float(kl.mean()),
        "choice_kl": float(kl[at_choice].mean()) if at_choice.any() else 0.0,
        "calibration": calibration(confidence[at_choice], right[at_choice]),
    }


def close_answers(compiled: CompiledTask, batches: Iterable[Batch]) -> float:
    """Share of the teacher's answers with a choice whose two likeliest allowed tokens are less than `CLOSE` nats apart.

    Another device or another batch may answer these otherwise, so no student can be asked for more than the rest.
    """
    allowed_SR, close = torch.from_numpy(compiled.automaton.allowed), []
    for batch in batches:
        allowed_MR = allowed_SR[batch.state[batch.choice]]  # the required tokens come first among the watched
        required_MR = batch.teacher[batch.choice, : allowed_MR.shape[1]].float()
        likely_M2 = required_MR.where(allowed_MR, -torch.inf).topk(2).values
        example_M = batch.predict[batch.choice] // batch.tokens.shape[1]
        near_B = torch.zeros(len(batch.tokens), dtype=torch.bool)
        near_B[example_M[likely_M2[:, 0] - likely_M2[:, 1] < CLOSE]] = True
        close.append(near_B)
    return float(torch.cat(close).float().mean())


def calibration(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> dict[str, Any]:
    """Expected calibration error over equal-width bins (Guo et al., 2017), and the bins.

    Args:
        confidence: [M], probability of the token chosen.
        right: [M], 1 where it is the teacher's.
    """
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        inside = index == i
        if inside.any():
            about = {"confidence": float(confidence[inside].mean()), "accuracy": float(right[inside].mean())}
            bins.append({"count": int(inside.sum())} | about)
    gaps = [b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins]
    return {"ece": float(sum(gaps) / max(1, len(confidence))), "bins": bins}
