"""The mean of a training's latest weights, which is the student: it forgets less of what one noisy answer has taught.

Weights that follow single examples wander; their mean does not (Polyak and Juditsky, "Acceleration of Stochastic Approximation
by Averaging", 1992). From 4,000 answers without logits it is worth 4 points of whole answers, with logits none (docs/log.md).
"""

from __future__ import annotations

import torch

from student.model.checkpoint import Tensors

HORIZON = 1 / 15  # of the steps: how far back the mean reaches; less at the beginning, a third of what was
LOOKS = 16  # at the weights within the horizon: under ZeRO they are gathered for each


class Average:
    """An exponential mean over some of a training's steps.

    Args:
        steps: of the whole training.

    Attributes:
        every: steps between two looks.
        weights: the mean, float32 on the CPU, by parameter name; none before the first look.
    """

    def __init__(self, steps: int) -> None:
        self.every = max(1, round(steps * HORIZON / LOOKS))
        self._least_share = min(1.0, self.every / (steps * HORIZON))
        self.weights: Tensors = {}

    @torch.no_grad()
    def look(self, step: int, weights: Tensors) -> None:
        """Takes in the weights after a step that is a multiple of `every`."""
        share = max(self._least_share, 3 / (step // self.every + 2))  # 1 at the first look
        if not self.weights:
            self.weights = {name: weight.clone() for name, weight in weights.items()}
        for name, mean in self.weights.items():
            mean.lerp_(weights[name], min(1.0, share))
