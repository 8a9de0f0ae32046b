"""Objectives: a divergence between teacher and student, and cross-entropy on the teacher's token, each with its weight.

All are pure functions of float32 tensors, one value a position. The mean over positions is taken by the trainer, once, over
the whole step: across accumulation and workers.

Shape suffixes: M positions, W watched tokens, C classes (W, or W + 1 with the tail), K stored temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pipeline.base.errors import UserError
from pipeline.teacher.capture import TEMPERATURES
from student.config import TrainConfig
from student.train.schedule import interpolate

TOP_K = 100  # of `topk`: the teacher's largest logits that count
TOP_SHARE = 0.05  # of `slim`: the share of them
SLIM_CLIP = 5.0  # largest weight of a position under `slim`
LEAST_TAIL = 1e-7  # float16 cannot tell a smaller mass outside the watched set from none

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def forward_kl(teacher_MC: torch.Tensor, student_MC: torch.Tensor) -> torch.Tensor:
    """KL(p_t ‖ p_s) in nats: [M]. Zero where the two are equal."""
    return (teacher_MC.exp() * (teacher_MC - student_MC)).sum(-1)


def reverse_kl(teacher_MC: torch.Tensor, student_MC: torch.Tensor) -> torch.Tensor:
    """KL(p_s ‖ p_t) in nats: [M]. MiniLLM's divergence (Gu et al., 2023) on stored logits; its on-policy RL is not here."""
    return forward_kl(student_MC, teacher_MC)


def top_kl(teacher_MC: torch.Tensor, student_MC: torch.Tensor) -> torch.Tensor:
    """KL over the teacher's K likeliest classes, both sides renormalised over those (NeMo-Aligner's KD-logit): [M]."""
    top = teacher_MC.topk(min(TOP_K, teacher_MC.shape[-1]))
    return forward_kl(top.values.log_softmax(-1), student_MC.gather(-1, top.indices).log_softmax(-1))


def slim(teacher_MC: torch.Tensor, student_MC: torch.Tensor) -> torch.Tensor:
    """KL(p̃_t ‖ p_s) times w, where p̃_t keeps the teacher's likeliest 5 % of classes and is zero elsewhere: [M].

    After SLIM (Raman et al., 2023). Its exact formula was not found in public; this is our reading of its description:
    w = min(p_t / p_s, `SLIM_CLIP`) at the teacher's likeliest token, without a gradient of its own, so a position counts
    more the surer the teacher is than the student.
    """
    top = teacher_MC.topk(max(1, int(TOP_SHARE * teacher_MC.shape[-1])))
    likely_M = student_MC.gather(-1, top.indices)
    confidence_M = (top.values[:, 0] - likely_M[:, 0]).detach().exp().clamp_max(SLIM_CLIP)
    return confidence_M * forward_kl(top.values.log_softmax(-1), likely_M)


@dataclass(frozen=True)
class Objective:
    """A divergence, and where its options start from when the configuration leaves them out.

    Attributes:
        divergence: called KL in the configuration, whichever it is; None where there is none.
        kl: its weight in the first and in the last step.
        ce: cross-entropy's weight in the first and in the last step.
        temperature: of the divergence's softmaxes.
    """

    divergence: Divergence | None
    kl: tuple[float, float]
    ce: tuple[float, float]
    temperature: float = 1.0


OBJECTIVES = {
    "curriculum": Objective(forward_kl, kl=(0.95, 0.9), ce=(0.05, 0.1)),  # measured: docs/objectives.md
    "hard-label": Objective(None, kl=(0, 0), ce=(1, 1)),
    "temperature": Objective(forward_kl, kl=(0.5, 0.5), ce=(0.5, 0.5), temperature=2),  # Hinton et al., 2015
    "topk": Objective(top_kl, kl=(1, 1), ce=(1, 1)),
    "slim": Objective(slim, kl=(1, 1), ce=(1, 1)),
    "reverse-kl": Objective(reverse_kl, kl=(1, 1), ce=(0, 0)),
}


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


class Loss:
    """An objective with a training's options.

    Args:
        token_weights_W: float32, the weight of each watched token in CE; None weighs all alike.

    Raises:
        UserError: the tail is wanted at a temperature that the shards do not know it at.
    """

    def __init__(self, config: TrainConfig, token_weights_W: torch.Tensor | None = None) -> None:
        objective = OBJECTIVES[config.objective]
        self._config, self._divergence, self._token_weights_W = config, objective.divergence, token_weights_W
        self._temperature = config.temperature or objective.temperature
        self._spans = {
            "kl": (_given(config.kl_start, objective.kl[0]), _given(config.kl_end, objective.kl[1])),
            "ce": (_given(config.ce_start, objective.ce[0]), _given(config.ce_end, objective.ce[1])),
        }
        if self._divergence is None:
            del self._spans["kl"]
        if config.tail and self._temperature not in TEMPERATURES:
            raise UserError(f"train.tail needs a train.temperature of {TEMPERATURES}: the shards know the tail's mass at those")

    @property
    def settings(self) -> dict[str, float]:
        """The options that the objective has values of its own for, as they are: temperature, `kl_start` and so on."""
        ends = {
            f"{name}_{end}": value
            for name, span in self._spans.items()
            for end, value in zip(("start", "end"), span, strict=True)
        }
        return {"temperature": self._temperature} | ends

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each term when this share of the training is done."""
        return {name: interpolate(self._config.weights, *span, progress) for name, span in self._spans.items()}

    def __call__(
        self,
        logits_MC: torch.Tensor,
        teacher_MW: torch.Tensor,
        lse_MK: torch.Tensor | None,
        targets_M: torch.Tensor,
        progress: float,
        training: bool = True,
    ) -> Terms:
        """The loss at each position.

        Args:
            logits_MC: float32, the student's.
            teacher_MW: float32, the teacher's log-probabilities under its full vocabulary.
            lse_MK: float32, the teacher's log-sum-exps; only for the tail.
            targets_M: int64, the column of the teacher's token.
            progress: share of the training that is done, 0 to 1.
            training: apply label smoothing and token weights, which no measure of a finished student has.
        """
        parts = {}
        if self._divergence is not None:
            temperature = self._temperature
            teacher_MC = teacher_classes(teacher_MW, lse_MK if self._config.tail else None, temperature)
            student_MC = (logits_MC / temperature).log_softmax(-1)
            parts["kl"] = temperature**2 * self._divergence(teacher_MC, student_MC)
        parts["ce"] = self._cross_entropy(logits_MC, targets_M, training)
        weights = self.weights(progress)
        return Terms(sum((weights[name] * part for name, part in parts.items()), torch.zeros(())), parts, weights)

    def _cross_entropy(self, logits_MC: torch.Tensor, targets_M: torch.Tensor, training: bool) -> torch.Tensor:
        """−log p_s of the teacher's token, in nats: [M]."""
        if not training:
            return F.cross_entropy(logits_MC, targets_M, reduction="none")
        smoothing = self._config.label_smoothing
        loss_M = F.cross_entropy(logits_MC, targets_M, reduction="none", label_smoothing=smoothing)
        return loss_M if self._token_weights_W is None else loss_M * self._token_weights_W[targets_M]


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def teacher_classes(teacher_MW: torch.Tensor, lse_MK: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """The teacher's log-probabilities at a temperature.

    Args:
        teacher_MW: log-probabilities under the full vocabulary at temperature 1.
        lse_MK: log-sum-exps of the full vocabulary's raw logits at each of TEMPERATURES: then the mass outside W is one
            more class, exact at those temperatures. None renormalises over W.
        temperature: one of TEMPERATURES where `lse_MK` is given.

    Returns:
        [M, W], or [M, W + 1] with the tail.
    """
    if lse_MK is None:
        return (teacher_MW / temperature).log_softmax(-1)
    raw_MW = teacher_MW + lse_MK[:, TEMPERATURES.index(1), None]
    inside_MW = raw_MW / temperature - lse_MK[:, TEMPERATURES.index(temperature), None]
    outside_M1 = (1 - inside_MW.exp().sum(-1, keepdim=True)).clamp_min(LEAST_TAIL)
    return torch.cat([inside_MW, outside_M1.log()], -1).log_softmax(-1)  # rounding apart, they add up to one already
