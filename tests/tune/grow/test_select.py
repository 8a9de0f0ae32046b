from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student.data.unpack import TEST, TRAIN, VALIDATION
from tune.config import GrowConfig
from tune.grow.select import POWER, draw_unsure, next_size, shares_of


def test_chances_are_as_the_doubt() -> None:
    confidence, drawn = 1 - np.array([0.1, 0.4, 0.5]) ** (1 / POWER), np.zeros(3)
    for seed in range(4000):
        drawn[draw_unsure(confidence, 1, np.random.default_rng(seed))] += 1
    np.testing.assert_allclose(drawn / 4000, np.array([0.1, 0.4, 0.5]), atol=0.03)


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(0, 40))
def test_none_is_drawn_twice(confidence: list[float], count: int) -> None:
    drawn = draw_unsure(np.array(confidence), count, np.random.default_rng(0)).tolist()
    assert len(drawn) == len(set(drawn)) == min(count, len(confidence))


@given(st.integers(0, 2000), st.tuples(*[st.integers(0, 1000)] * 3))
def test_each_split_has_its_share_as_far_as_it_has_texts(count: int, texts: tuple[int, int, int]) -> None:
    there = dict(zip((TRAIN, VALIDATION, TEST), texts, strict=True))
    shares = shares_of(count, there)
    assert sum(shares.values()) == min(count, sum(texts))
    assert all(0 <= shares[split] <= there[split] for split in there)
    if all(there[split] >= count for split in there):
        assert shares[VALIDATION] == shares[TEST] == round(count / 10)


@pytest.mark.parametrize(("texts", "sizes"), [(10_000, [1000, 1501, 2252, 3000]), (1200, [1000, 1200]), (30, [30])])
def test_rounds_grow_until_all_is_asked(texts: int, sizes: list[int]) -> None:
    config, calls = GrowConfig(calls=3000), [0]
    while (size := next_size(calls[-1], config, texts)) > calls[-1]:
        calls.append(size)
    assert calls[1:] == sizes
