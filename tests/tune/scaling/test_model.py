"""The model of scaling against timings made up by its formulas as this file has them, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.scaling.model import (
    BUCKET,
    FURTHEST,
    Curve,
    ExtractModel,
    Link,
    TrainModel,
    bootstrap,
    expected_largest,
    fit_extract,
    fit_train,
    interval,
    nonnegative_least_squares,
    ring_volume,
)
from tune.scaling.rows import ExtractRow, TrainRow

GIGABYTE, MICROSECOND = 1e9, 1e-6
LINK = Link(12.5 * GIGABYTE, 10 * MICROSECOND)
LOCAL = Link(2 * GIGABYTE, 60 * MICROSECOND)
SMALL = 4_000_000  # bytes of gradients in one bucket


def extract_row(workers: int, nodes: int, each: float, startup: float = 20.0) -> ExtractRow:
    return ExtractRow(workers=workers, nodes=nodes, rows=256, unit=[256 * each] * 5, startup=startup, manifest=0.002)


def train_row(
    workers: int, share: int, nodes: int = 1, size: int = SMALL, hidden: float = 0.0, waited: float = 0.0
) -> TrainRow:
    """A step of 10 ms, 2 ms an example, 0.5 ms more for each neighbour; exchange by a ring."""
    per_node = -(-workers // nodes)
    alone = 0.010 + share * (0.002 + 0.0005 * (per_node - 1))
    band = LOCAL.bandwidth if nodes == 1 else min(LOCAL.bandwidth, LINK.bandwidth)
    hops = 2 * (workers - nodes) * LOCAL.latency + 2 * (nodes - 1) * LINK.latency
    whole, ping = (2 * (workers - 1) / workers * b / band + math.ceil(b / BUCKET) * hops for b in (SMALL, 4))
    step = alone + (1 - hidden) * whole + waited * expected_largest(workers) * alone
    samples = {"exchange": [whole] * 5, "ping": [ping] * 5} if workers > 1 else {"exchange": [], "ping": []}
    steps = {"step": [step if workers > 1 else alone] * 5, "alone": [alone] * 5}
    return TrainRow(workers=workers, nodes=nodes, share=share, bytes=SMALL, startup=9.0, **samples, **steps)


ONE_AND_TWO = [train_row(1, 32), train_row(1, 16), train_row(2, 32), train_row(2, 16)]


def test_extraction_recovers_what_it_was_made_of() -> None:
    model = fit_extract([extract_row(1, 1, 0.010, 20.0), extract_row(2, 1, 0.013, 25.0)])
    assert model.row == pytest.approx(0.010, rel=1e-9)
    assert model.sharing == pytest.approx(0.003, rel=1e-9)
    assert (model.start, model.manifest, model.unit_rows, model.per_node) == (25.0, 0.002, 256, 2)


def test_training_recovers_what_it_was_made_of() -> None:
    model = fit_train(ONE_AND_TWO, LINK, tree=False)
    assert model.fixed == pytest.approx(0.010, rel=1e-6)
    assert model.example == pytest.approx(0.002, rel=1e-6)
    assert model.sharing == pytest.approx(0.0005, rel=1e-6)
    assert model.local.bandwidth == pytest.approx(LOCAL.bandwidth, rel=1e-6)
    assert model.local.latency == pytest.approx(LOCAL.latency, rel=1e-6)
    assert model.link == LINK
    assert model.overlap == pytest.approx(0, abs=1e-9)
    assert model.waiting == pytest.approx(0, abs=1e-9)
    for row in ONE_AND_TWO:
        assert sum(model.terms(row.workers, row.share).values()) == pytest.approx(row.step[0], rel=1e-6)


def test_two_machines_tell_of_the_link_between_them() -> None:
    rows = [*ONE_AND_TWO, train_row(4, 32, nodes=2), train_row(8, 32, nodes=4)]
    model = fit_train(rows, Link(1.0, 1.0), tree=False)
    assert model.link.bandwidth == pytest.approx(LOCAL.bandwidth, rel=1e-6)  # the ring's slowest link is within a machine
    assert model.link.latency == pytest.approx(LINK.latency, rel=1e-5)


@pytest.mark.parametrize(("hidden", "waited"), [(0.4, 0.0), (0.0, 0.1)])
def test_overlap_and_waiting(hidden: float, waited: float) -> None:
    rows = [train_row(n, share, hidden=hidden, waited=waited) for n in (1, 2) for share in (32, 16)]
    model = fit_train(rows, LINK, tree=False)
    assert model.overlap == pytest.approx(hidden, abs=1e-9)
    assert model.waiting == pytest.approx(waited, abs=1e-9)


def test_one_worker_alone_assumes_the_links_and_sees_no_sharing() -> None:
    model = fit_train(ONE_AND_TWO[:2], LINK, tree=False)
    assert (model.local, model.link, model.sharing, model.per_node) == (LINK, LINK, 0.0, 1)


def test_noise_moves_the_parameters_little_and_the_interval_holds_them() -> None:
    random = np.random.default_rng(1)

    def noisy(row: TrainRow) -> TrainRow:
        alone = row.alone[0] * random.normal(1, 0.03, 15)
        return row.model_copy(update={"alone": alone.tolist(), "step": (alone + row.step[0] - row.alone[0]).tolist()})

    rows = [noisy(row) for row in ONE_AND_TWO]
    model = fit_train(rows, LINK, tree=False)
    assert model.example == pytest.approx(0.002, rel=0.1)
    low, high = interval(each.example for each in bootstrap(rows, lambda some: fit_train(some, LINK, tree=False)))
    assert low < 0.002 < high


def test_coefficients_are_never_negative() -> None:
    falling = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    flat, slope = nonnegative_least_squares(falling, np.array([3.0, 2.0, 1.0]))
    assert slope == 0
    assert flat > 0
    assert nonnegative_least_squares(falling, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])


def test_the_largest_of_many_by_sampling() -> None:
    assert expected_largest(1) == 0
    samples = np.random.default_rng(0).normal(size=(40_000, 64)).max(axis=1)
    assert expected_largest(64) == pytest.approx(samples.mean(), rel=0.02)


def test_rings_and_trees() -> None:
    model = TrainModel(0.0, 0.001, 0.0, 0.0, 0.0, LINK, LINK, SMALL, 1, tree=False)
    volume, hops = model.exchange(512)
    assert volume == pytest.approx(2 * 511 / 512 * SMALL / LINK.bandwidth)
    assert hops == pytest.approx(2 * 511 * LINK.latency)
    volume, hops = replace(model, tree=True).exchange(512)
    assert volume == pytest.approx(2 * SMALL / LINK.bandwidth)
    assert hops == pytest.approx(2 * 9 * LINK.latency)
    many = replace(model, bytes=10 * BUCKET)
    assert many.exchange(2)[1] == pytest.approx(10 * 2 * LINK.latency)
    assert model.exchange(1) == (0.0, 0.0)


def test_the_backward_pass_hides_no_more_than_it_takes() -> None:
    slow = Link(SMALL / 1.0, 0.0)  # a second and more for an exchange beside a step of 0.1 s
    model = TrainModel(0.1, 0.0, 0.0, 0.0, 1.0, slow, slow, SMALL, 1, tree=False)
    terms = model.terms(2, 1)
    assert terms["volume"] == pytest.approx(1.0 - 2 / 3 * 0.1)
    fast = replace(model, local=LINK, link=LINK)
    assert fast.terms(2, 1)["volume"] == 0


def test_where_extraction_falls_under_80_percent_by_hand() -> None:
    """10 s of start against 1,000 s of units of 1 s: 0.8 is 1010 / (n (10 + 1000 / n)), so n = 26.25."""
    curve = ExtractModel(10.0, 0.01, 0.0, 0.0, 100, 1).job(100_000)
    whole = [n for n in range(1, 101) if 1000 % n == 0]
    assert [curve.efficiency(n) for n in whole] == pytest.approx([1010 / (10 * n + 1000) for n in whole], rel=1e-12)
    first = next(n for n in range(1, 100) if 1010 / (n * (10 + math.ceil(1000 / n))) < 0.8)
    assert curve.falls_under(0.8) == first == 26
    assert curve.limit(first) == "start"
    units = ExtractModel(0.0, 0.01, 0.0, 0.0, 100, 1).job(1_000)
    assert units.efficiency(10) == pytest.approx(1)
    assert units.falls_under(0.8) == 7  # 10 units: each of 7 waits for those with 2
    assert units.limit(7) == "last units"
    assert units.throughput(10_000) == units.throughput(10)


def test_the_manifest_is_amdahls_serial_part() -> None:
    curve = ExtractModel(0.0, 0.01, 0.0, 0.1, 100, 1).job(409_600)
    assert curve.efficiency(1024) == pytest.approx(1.1 / (1 + 0.1 * 1024))
    assert curve.limit(1024) == "manifest"


def test_strong_scaling_ends_with_one_example_for_each_worker() -> None:
    curve = fit_train(ONE_AND_TWO, LINK, tree=False).strong(32)
    assert curve.most == 32
    assert curve.limit(32) in {"fixed", "hops"}
    assert curve.falls_under(0.001) is None


fractions = st.floats(0, 1)
seconds = st.floats(1e-6, 10)
links = st.builds(Link, st.floats(1e6, 1e12), st.floats(0, 1e-2))
trainings = st.builds(
    TrainModel, seconds, seconds, st.floats(0, 1), fractions, fractions, links, links,
    st.integers(4, 10**10), st.integers(1, 16), st.booleans(),
)  # fmt: skip
extractions = st.builds(
    ExtractModel, st.floats(0, 1000), seconds, st.floats(0, 1), fractions, st.integers(1, 512), st.integers(1, 16)
)
curves = st.one_of(
    st.builds(TrainModel.weak, trainings, st.integers(1, 512)),
    st.builds(TrainModel.strong, trainings, st.integers(1, 4096)),
    st.builds(ExtractModel.job, extractions, st.integers(1, 10**7)),
    st.builds(ExtractModel.steady, extractions),
)


@given(curves, st.integers(1, FURTHEST))
def test_efficiency_is_a_share_and_what_is_lost_adds_up(curve: Curve, workers: int) -> None:
    workers = min(workers, curve.most or workers)
    efficiency = curve.efficiency(workers)
    assert 0 < efficiency <= 1 + 1e-9
    losses = curve.losses(workers)
    assert sum(losses.values()) == pytest.approx(1 - efficiency, abs=1e-9)
    assert min(losses.values()) > -1e-9
    assert curve.efficiency(1) == pytest.approx(1)


@given(trainings, st.integers(1, 512), st.integers(1, 2000))
def test_more_workers_never_raise_the_efficiency_of_a_ring(model: TrainModel, share: int, workers: int) -> None:
    uniform = replace(model, tree=False, link=model.local, per_node=1)
    curve = uniform.weak(share)
    assert curve.efficiency(workers + 1) <= curve.efficiency(workers) * (1 + 1e-9)


@given(extractions, st.integers(1, 10**7), st.floats(0.05, 0.95))
def test_a_fall_is_the_first_one(model: ExtractModel, rows: int, level: float) -> None:
    curve = model.job(rows)
    first = curve.falls_under(level)
    counts = range(1, min(first or 50, 50))
    assert all(curve.efficiency(count) >= level for count in counts)
    assert first is None or curve.efficiency(first) < level


@given(st.integers(1, 10_000))
def test_a_ring_sends_less_than_twice_the_gradients(workers: int) -> None:
    assert ring_volume(workers) == pytest.approx(2 - 2 / workers)
