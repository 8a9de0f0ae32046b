"""Certificates hold as often as they say, for any student."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student.decode.answerer import WHOLE
from student.evaluate.certificate import RISK, Counts, Evidence, _tails, certify, count, texts_to_certify


def evidence(random: np.random.Generator, texts: int, honest: bool = True) -> Evidence:
    """Of a student whose confidence is its share of equal answers, or far above it."""
    fields = {name: 1 - random.random(texts) ** 2 / 2 for name in ("team", "urgent")}
    agrees = {name: random.random(texts) < (sure if honest else sure**2) for name, sure in fields.items()}
    both = {WHOLE: np.prod(list(fields.values()), 0)} | fields
    return Evidence(both, {WHOLE: agrees["team"] & agrees["urgent"]} | agrees)


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("targets", [{WHOLE: 0.9}, {WHOLE: 0.8, "urgent": 0.95}, {"team": 0.95}])
def test_a_target_is_missed_as_seldom_as_promised(targets: dict[str, float], honest: bool) -> None:
    random, missed, given_out = np.random.default_rng(3), 0, 0
    world = evidence(random, 20_000, honest)
    for _ in range(500):
        found = certify(targets, evidence(random, 1000, honest), evidence(random, 1000, honest))
        if found:
            given_out += 1
            truth = count(found.limit, targets, world)
            missed += any(truth.agreed[name] < share * truth.alone for name, share in targets.items())
    assert given_out >= 50
    assert missed <= 500 * RISK + 3 * math.sqrt(500 * RISK * (1 - RISK))


def test_validation_that_flatters_costs_coverage_but_no_truth() -> None:
    random, missed = np.random.default_rng(4), 0
    world = evidence(random, 20_000, honest=False)
    for _ in range(300):
        flattering = evidence(random, 300)
        found = certify({WHOLE: 0.8}, flattering, evidence(random, 300, honest=False))
        truth = count(found.limit, {WHOLE: 0.8}, world) if found else None
        missed += truth is not None and truth.agreed[WHOLE] < 0.8 * truth.alone
    assert missed <= 300 * RISK + 3 * math.sqrt(300 * RISK * (1 - RISK))


def test_a_good_student_answers_most_alone() -> None:
    random = np.random.default_rng(5)
    found = certify({WHOLE: 0.7}, evidence(random, 5000), evidence(random, 5000))
    assert found is not None
    assert found.alone > 0.9 * found.texts
    assert found.bound(WHOLE) >= 0.7


def tail(alone: int, agreed: int, target: float) -> float:
    """Of one target."""
    return float(_tails(np.array([alone]), {WHOLE: np.array([agreed])}, {WHOLE: target})[0])


@given(st.integers(0, 400), st.integers(0, 400), st.floats(0.5, 0.999))
def test_what_passes_is_bounded_by_its_target(equal: int, others: int, target: float) -> None:
    counts = Counts(1.0, equal + others, equal + others, {WHOLE: equal})
    passes, bound = tail(equal + others, equal, target) <= RISK, counts.bound(WHOLE)
    assert passes == (bound >= target) or abs(bound - target) < 1e-9


def test_binomial_by_hand() -> None:
    assert tail(59, 59, 0.95) == pytest.approx(0.95**59)
    assert tail(2, 1, 0.5) == pytest.approx(0.75)


def few(texts: int, wrong: int) -> Evidence:
    """Equally sure of all texts."""
    agrees = np.arange(texts) >= wrong
    return Evidence({WHOLE: np.full(texts, 0.9)}, {WHOLE: agrees})


def test_how_many_texts_are_missing() -> None:
    assert certify({WHOLE: 0.95}, few(58, 0), few(58, 0)) is None
    needed = texts_to_certify({WHOLE: 0.95}, few(58, 0))
    assert needed is not None
    assert 59 <= needed <= 66
    assert certify({WHOLE: 0.95}, few(59, 0), few(59, 0)) is not None
    assert texts_to_certify({WHOLE: 0.95}, few(100, 5)) is None  # no number makes this student good enough
