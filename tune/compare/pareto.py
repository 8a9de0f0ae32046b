"""The Pareto front: what no other point beats in every respect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Direction = Literal["max", "min"]


def front(points: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.bool_]:
    """Which points no other dominates, that is: is at least as good in every column and better in one.

    Equal points do not dominate each other, so all of them may be on the front. A point with a NaN is not on it, and
    dominates none.

    Args:
        points: [N, D], a row a point.
        directions: [D], whether more or less of a column is better.

    Returns:
        [N], True where the point is on the front.

    Raises:
        ValueError: the points have not as many columns as there are directions.
    """
    values_ND = np.asarray(points, dtype=np.float64)
    if not values_ND.size:
        return np.zeros(len(values_ND), dtype=bool)
    if values_ND.ndim != 2 or values_ND.shape[1] != len(directions):
        raise ValueError(f"points of shape {values_ND.shape} do not fit {len(directions)} directions")
    gains_ND = values_ND * np.array([1.0 if direction == "max" else -1.0 for direction in directions])
    known = ~np.isnan(gains_ND).any(axis=1)
    as_good = (gains_ND[:, None, :] >= gains_ND[None, :, :]).all(axis=2)  # [i, j]: i is nowhere worse than j
    dominates = as_good & (gains_ND[:, None, :] > gains_ND[None, :, :]).any(axis=2) & known[:, None]
    return known & ~dominates.any(axis=0)
