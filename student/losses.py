"""Objectives: pure functions of teacher and student logits at M positions over W watched tokens, in float32.

An objective returns its loss at each position and the terms it is made of. The mean over positions is taken by the
trainer, once, over the whole step: across accumulation and workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Terms:
    """A loss at each position and what it is made of.

    Attributes:
        loss: [M].
        parts: the terms before weighting, each [M].
        weights: the weight of each part.
    """

    loss: torch.Tensor
    parts: dict[str, torch.Tensor]
    weights: dict[str, float]


Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Terms]


def kl_divergence(teacher_MW: torch.Tensor, student_MW: torch.Tensor) -> torch.Tensor:
    """KL(p_t ‖ p_s) in nats at each position, both softmaxed over W: [M]. Zero where the two are equal."""
    teacher = teacher_MW.log_softmax(-1)
    return (teacher.exp() * (teacher - student_MW.log_softmax(-1))).sum(-1)


def cross_entropy(student_MW: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    """−log p_s of the teacher's token, in nats, at each position: [M]."""
    return F.cross_entropy(student_MW, targets_M, reduction="none")


def curriculum(student_MW: torch.Tensor, teacher_MW: torch.Tensor, targets_M: torch.Tensor, kl_weight: float) -> Terms:
    """The thesis' loss: a·KL(p_t ‖ p_s) + (1 − a)·CE, both terms always present.

    Args:
        student_MW: float32 logits.
        teacher_MW: float32 logits.
        targets_M: int64, the column of the teacher's token.
        kl_weight: a.
    """
    parts = {"kl": kl_divergence(teacher_MW, student_MW), "ce": cross_entropy(student_MW, targets_M)}
    weights = {"kl": kl_weight, "ce": 1 - kl_weight}
    return Terms(weights["kl"] * parts["kl"] + weights["ce"] * parts["ce"], parts, weights)


def hard_label(student_MW: torch.Tensor, teacher_MW: torch.Tensor, targets_M: torch.Tensor, kl_weight: float) -> Terms:
    """Cross-entropy on the teacher's token alone (SFT on its answers). The other arguments are not used."""
    loss = cross_entropy(student_MW, targets_M)
    return Terms(loss, {"ce": loss}, {"ce": 1.0})


OBJECTIVES: dict[str, Objective] = {"curriculum": curriculum, "hard-label": hard_label}
