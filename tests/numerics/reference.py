"""The objectives in float64 numpy, written from their formulas; nothing here is the product's.

Gradients are complex-step derivatives: f(x + ih) has the imaginary part h · f'(x), exactly, for h that float64 can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
H = 1e-30
CLIP = 5.0

WEIGHTS = {  # KL at the first and last step, then CE
    "curriculum": ((0.95, 0.9), (0.05, 0.1)),
    "hard-label": ((0, 0), (1, 1)),
    "temperature": ((0.5, 0.5), (0.5, 0.5)),
    "topk": ((1, 1), (1, 1)),
    "slim": ((1, 1), (1, 1)),
    "reverse-kl": ((1, 1), (0, 0)),
}


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.real.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def gradient(loss: Callable[[Array], Array], logits: Array) -> Array:
    """Of a loss [M] at logits [M, C], each position's in its own logits."""
    columns = []
    for column in range(logits.shape[1]):
        moved = logits.astype(complex)
        moved[:, column] += 1j * H
        columns.append(loss(moved).imag / H)
    return np.stack(columns, 1)


def dense_classes(full: Array, watched: int, temperature: float, tail: bool) -> Array:
    """Log-probabilities from the raw logits [M, V] of a whole vocabulary, whose first tokens are the watched ones."""
    if not tail:
        return log_softmax(full[:, :watched] / temperature)
    everything = log_softmax(full / temperature)
    outside = np.log(np.exp(everything[:, watched:]).sum(-1, keepdims=True))
    return np.concatenate([everything[:, :watched], outside], -1)


@dataclass(frozen=True)
class Reference:
    """One objective with its options, of positions whose teacher is known in full."""

    objective: str
    teacher: Array  # [M, V] raw logits
    targets: Array  # [M]
    watched: int
    temperature: float
    tail: bool
    top_k: int
    top_share: float
    smoothing: float
    token_weights: Array | None
    kl: float
    ce: float

    def __call__(self, student: Array) -> tuple[Array, Array]:
        """The loss [M] and its gradient [M, C]."""
        rank = self._rank(student)  # a constant of the gradient
        return self._loss(student, rank), gradient(lambda moved: self._loss(moved, rank), student)

    def _loss(self, student: Array, slim_weight: Array) -> Array:
        return self.kl * self.temperature**2 * self._divergence(student, slim_weight) + self.ce * self._cross_entropy(student)

    def _teacher(self) -> Array:
        return dense_classes(self.teacher, self.watched, self.temperature, self.tail)

    def _divergence(self, student: Array, slim_weight: Array) -> Array:
        p_t, raw = np.exp(self._teacher()), student / self.temperature
        log_s = log_softmax(raw)
        if self.objective == "hard-label":
            return np.zeros(len(student))
        if self.objective == "reverse-kl":
            return (np.exp(log_s) * (log_s - np.log(p_t))).sum(-1)
        if self.objective == "topk":
            kept = self._largest(self.top_k)
            inside = np.where(kept, np.exp(log_s), 0)
            log_s = np.where(kept, np.log(np.where(kept, inside / inside.sum(-1, keepdims=True), 1)), 0)
            return _kl(_renormalised(p_t, kept), log_s)
        if self.objective == "slim":
            kept = self._largest(max(1, int(self.top_share * p_t.shape[1])))
            return slim_weight * _kl(_renormalised(p_t, kept), log_s)
        return _kl(p_t, log_s)

    def _largest(self, count: int) -> Array:
        """Which classes are among the teacher's so many largest."""
        order = np.argsort(np.argsort(-self._teacher(), -1), -1)
        return order < count

    def _rank(self, student: Array) -> Array:
        teacher, rows = self._teacher(), np.arange(len(student))
        best = teacher.argmax(-1)
        ratio = np.exp(teacher[rows, best] - log_softmax(student / self.temperature)[rows, best])
        return np.minimum(ratio, CLIP)

    def _cross_entropy(self, student: Array) -> Array:
        classes = student.shape[1]
        aim = (1 - self.smoothing) * np.eye(classes)[self.targets] + self.smoothing / classes
        loss = -(aim * log_softmax(student)).sum(-1)
        return loss if self.token_weights is None else loss * self.token_weights[self.targets]


def _renormalised(probability: Array, kept: Array) -> Array:
    inside = np.where(kept, probability, 0)
    return inside / inside.sum(-1, keepdims=True)


def _kl(p: Array, log_q: Array) -> Array:
    """KL(p ‖ q), where p may be zero."""
    return (p * (np.log(np.where(p > 0, p, 1)) - log_q)).sum(-1)
