from __future__ import annotations

import pytest

from student.schedule import cosine_annealing, linear


def test_linear_meets_both_ends() -> None:
    assert [linear(0.8, 0.2, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.8, 0.5, 0.2])


def test_cosine_rises_to_its_peak_then_falls_to_nothing() -> None:
    rates = [cosine_annealing(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert cosine_annealing(0, 10, 0.0) == 1.0
