from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student.train.schedule import cosine_annealing, interpolate

SHARES = st.floats(0, 1)


def test_constant_stays_at_the_start() -> None:
    assert [interpolate("constant", 0.8, 0.2, share) for share in (0.0, 0.5, 1.0)] == [0.8] * 3


def test_linear_falls_evenly() -> None:
    assert [interpolate("linear", 0.8, 0.2, share) for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.8, 0.65, 0.5, 0.2])


def test_cosine_is_slow_at_both_ends() -> None:
    values = [interpolate("cosine", 1.0, 0.0, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0])


def test_step_has_the_end_from_half_way_on() -> None:
    assert [interpolate("step", 3.0, 5.0, share) for share in (0.0, 0.49, 0.5, 1.0)] == [3.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize("shape", ["linear", "cosine", "step"])
@given(start=st.floats(0, 10), end=st.floats(0, 10), early=SHARES, late=SHARES)
def test_a_weight_goes_one_way_from_start_to_end(shape: str, start: float, end: float, early: float, late: float) -> None:
    early, late = sorted((early, late))
    first, before, after, last = (interpolate(shape, start, end, share) for share in (0.0, early, late, 1.0))
    assert first == start
    assert last == pytest.approx(end)
    assert (after - before) * (end - start) >= -1e-9


def test_the_learning_rate_rises_to_its_peak_then_falls_to_nothing() -> None:
    rates = [cosine_annealing(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert cosine_annealing(0, 10, 0.0) == 1.0
