"""Which texts to ask the teacher about next.

Validation and test texts are taken at random, in their share of the pool, so that a certificate holds for texts like the
pool's. The others are drawn by how unsure the student is of them: chance keeps them from being all of one kind, which the
surest order would make them ("stochastic batch acquisition", Kirsch et al., 2021, arXiv 2106.12059).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from student.data.unpack import SPLIT_TENTHS, TRAIN
from tune.config import GrowConfig

POWER = 4.0  # of 1 − confidence, in the chance to be drawn; see docs/log.md
LEAST = 1e-6  # 1 − confidence is taken as at least this

Places = NDArray[np.int64]


def draw_unsure(confidence: NDArray[np.float64], count: int, rng: np.random.Generator) -> Places:
    """Places of texts, drawn without replacement with chances as 1 − confidence to a power: int64 [count] at most.

    Args:
        confidence: of the student in each text's whole answer, [N].
    """
    unsure = POWER * np.log(np.maximum(1 - confidence, LEAST))
    return np.argsort(-(unsure + rng.gumbel(size=len(unsure))), kind="stable")[:count]  # the Gumbel-top-k trick


def shares_of(count: int, there: dict[str, int]) -> dict[str, int]:
    """How many of so many texts to take of each split, of those that are there; where one has too few, others have more."""
    tenths = {split: len(tenths) for split, tenths in SPLIT_TENTHS.items() if split != TRAIN}
    shares = {split: min(round(count * share / 10), there[split]) for split, share in tenths.items()}
    for split in (TRAIN, *tenths):
        shares[split] = min(count - sum(shares.values()) + shares.get(split, 0), there[split])
    return shares


def next_size(calls: int, config: GrowConfig, texts: int) -> int:
    """Texts asked about by the end of the next round, after so many, of a pool of `texts`: `calls` where all are."""
    most = min(config.calls, texts)
    return min(most, int(config.growth * calls) + 1 if calls else config.first)
