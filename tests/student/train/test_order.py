from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from student.config import TrainConfig
from student.train.order import WINDOW, Order, parts


def make_order(examples: int, batch: int, **options: Any) -> Order:
    lengths = np.random.default_rng(7).integers(20, 90, examples).astype(np.int32)
    return Order(lengths, TrainConfig(batch_size=batch, cpus_per_worker=1, **options))


def drawn(order: Order, epoch: int) -> list[list[int]]:
    return [batch.tolist() for batch in order.epoch(epoch)]


@given(examples=st.integers(8, 1500), batch=st.integers(1, 8), epoch=st.integers(1, 5), seed=st.integers(0, 9))
def test_an_epoch_is_a_permutation_cut_into_batches(examples: int, batch: int, epoch: int, seed: int) -> None:
    order = make_order(examples, batch, seed=seed)
    batches = drawn(order, epoch)
    seen = [i for step in batches for i in step]
    assert len(batches) == order.steps == examples // batch
    assert {len(step) for step in batches} == {batch}
    assert len(set(seen)) == len(seen) == order.steps * batch
    assert set(seen) <= set(range(examples))


def test_every_example_has_its_turn_though_each_epoch_leaves_some_out() -> None:
    order = make_order(37, 8)
    seen = Counter(i for epoch in range(1, 30) for step in drawn(order, epoch) for i in step)
    assert set(seen) == set(range(37))


def padding(lengths: np.ndarray, batches: list[list[int]]) -> int:
    return sum(int((lengths[step].max() - lengths[step]).sum()) for step in batches)


def test_the_lengths_of_a_batch_are_close() -> None:
    order, size = make_order(3000, 16), 16
    random = np.random.default_rng(0).permutation(3000)[: order.steps * size].reshape(-1, size).tolist()
    assert padding(order.lengths, drawn(order, 1)) < 0.15 * padding(order.lengths, random)


def test_batches_of_short_and_long_examples_are_mixed_over_a_window() -> None:
    order = make_order(WINDOW * 16, 16)
    means = np.array([order.lengths[step].mean() for step in drawn(order, 1)])
    assert abs(np.corrcoef(np.arange(WINDOW), means)[0, 1]) < 0.5


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    first, again = make_order(300, 10, seed=1), make_order(300, 10, seed=1)
    assert drawn(first, 1) == drawn(again, 1)
    assert drawn(first, 1) not in (drawn(first, 2), drawn(make_order(300, 10, seed=2), 1))


def test_order_does_not_depend_on_who_trains() -> None:
    plain, shared = make_order(300, 12), make_order(300, 12, workers=(1, 4), accumulation=3)
    assert drawn(plain, 3) == drawn(shared, 3)


@given(examples=st.integers(40, 400), batch=st.integers(2, 8), share=st.sampled_from([0.01, 0.25, 0.4, 0.9]))
def test_growth_draws_from_the_first_share_alone_in_as_many_steps(examples: int, batch: int, share: float) -> None:
    growing = make_order(examples, batch, growth=(share, 1.0))
    batches = drawn(growing, 1)
    counts = Counter(i for step in batches for i in step)
    assert len(batches) == growing.steps == make_order(examples, batch).steps
    assert len(counts) <= max(batch, round(share * examples))
    assert all(len(set(step)) == batch for step in batches)
    assert drawn(growing, 2) == drawn(make_order(examples, batch), 2)


def test_growth_draws_the_known_examples_about_as_often() -> None:
    order = make_order(1000, 8, growth=(0.1, 1.0))
    counts = Counter(i for step in drawn(order, 1) for i in step)
    assert len(counts) == 100
    assert min(counts.values()) >= 7  # of ten passes, each without four of the hundred


def test_growth_adds_to_what_was_there_and_the_last_share_stays() -> None:
    order = make_order(400, 8, growth=(0.1, 0.3, 0.6))
    known = [{i for step in drawn(order, epoch) for i in step} for epoch in (1, 2, 3, 4)]
    assert [len(examples) for examples in known] == [40, 120, 240, 240]
    assert known[0] < known[1] < known[2] == known[3]
    assert drawn(order, 3) != drawn(order, 4)


@given(size=st.integers(1, 64), workers=st.integers(1, 6), accumulation=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_the_parts_of_all_workers_are_the_batch_once(size: int, workers: int, accumulation: int, seed: int) -> None:
    batch = np.random.default_rng(seed).permutation(1000)[: size * workers * accumulation]
    shares = [parts(batch, rank, workers, accumulation) for rank in range(workers)]
    assert sorted(i for share in shares for part in share for i in part) == sorted(batch)
    assert {len(share) for share in shares} == {accumulation}
    assert all(len(part) for share in shares for part in share)


@given(workers=st.integers(1, 6), accumulation=st.integers(1, 5), more=st.integers(0, 7))
def test_no_part_is_empty_in_the_smallest_batch_that_is_taken(workers: int, accumulation: int, more: int) -> None:
    order = make_order(100, workers * accumulation + more, workers=(1, workers), accumulation=accumulation)
    batch = next(order.epoch(1))
    for count in range(1, workers + 1):  # elastic training may have any number of them
        assert all(len(part) for rank in range(count) for part in parts(batch, rank, count, accumulation))


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(UserError, match="5 training examples, batches of 8, 1 parts"):
        _ = make_order(5, 8).steps
    with pytest.raises(UserError, match="batches of 8, 12 parts"):
        _ = make_order(100, 8, workers=(2, 4), accumulation=3).steps
    assert make_order(8, 8).steps == 1
    assert make_order(100, 12, workers=(2, 4), accumulation=3).steps == 8
