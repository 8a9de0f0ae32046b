from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tune.compare.pareto import Direction, front

few = st.sampled_from([0.0, 1.0, 2.0, 3.0, float("inf"), float("nan")])  # few, so that equal ones are common


def by_brute_force(points: np.ndarray, directions: list[Direction]) -> list[bool]:
    def gains(row: np.ndarray) -> list[float]:
        return [value if direction == "max" else -value for value, direction in zip(row, directions, strict=True)]

    def dominated(row: list[float], other: list[float]) -> bool:
        no_worse = all(b >= a for a, b in zip(row, other, strict=True))
        return no_worse and any(b > a for a, b in zip(row, other, strict=True))

    rows = [gains(row) for row in points]
    return [not any(np.isnan(row)) and not any(dominated(row, o) for o in rows if not any(np.isnan(o))) for row in rows]


@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=few), st.data())
def test_against_brute_force(points: np.ndarray, data: st.DataObject) -> None:
    directions = data.draw(st.lists(st.sampled_from(["max", "min"]), min_size=points.shape[1], max_size=points.shape[1]))
    assert front(points, directions).tolist() == by_brute_force(points, directions)


def test_by_hand() -> None:
    points = [(0.80, 5), (0.80, 5), (0.79, 5), (0.74, 1), (0.74, 2), (0.90, float("nan"))]
    assert front(points, ("max", "min")).tolist() == [True, True, False, True, False, False]
    assert front([], ("max", "min")).tolist() == []
    with pytest.raises(ValueError, match="2 directions"):
        front([[1.0]], ("max", "min"))
