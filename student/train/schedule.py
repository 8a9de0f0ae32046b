"""What changes over a training: pure functions of how far it has come."""

from __future__ import annotations

import math


def interpolate(shape: str, start: float, end: float, progress: float) -> float:
    """The value between `start` (progress 0) and `end` (progress 1).

    Args:
        shape: `constant` stays at the start; `linear`; `cosine`, half a wave, slow at both ends; `step`, the start in
            the first half and the end from there.
        progress: 0 to 1.
    """
    share = {
        "constant": 0.0,
        "linear": progress,
        "cosine": 0.5 - 0.5 * math.cos(math.pi * progress),
        "step": float(progress >= 0.5),
    }[shape]
    return start + (end - start) * share


def cosine_annealing(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step (from 0): a linear rise over the warm-up, then half a cosine to zero.

    Loshchilov and Hutter, "SGDR", 2017, without restarts.
    """
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
