"""A model of how extraction and training scale, fitted to measurements at a few worker counts. Pure: numbers in, numbers out.

Symbols: n workers on m = ⌈n / w⌉ machines with up to w of them each, w as measured. The model says what more machines of
the measured kind would do; it does not guess what a fuller machine would.

**Extraction** of R comments in U = ⌈R / r⌉ units takes

    T(n) = S  +  ⌈U / n⌉ · r · (c + d · (min(n, w) − 1))  +  μ · U

S seconds until all actors are at work, c seconds a comment, d more for each other actor on the machine (they share its memory
and cores), r comments of a unit, which one actor takes whole, and μ seconds the driver takes for a unit's line in the manifest.

**A training step** with b examples for each worker takes

    t(n, b) = a  +  b · (c + d · (min(n, w) − 1))  +  exposed(n)  +  σ · z(n) · (compute)

The first two, together `compute`, are what a worker does alone: a is the optimizer's update and all else that does not depend
on b. All workers wait for the slowest: z(n) is the expected largest of n standard normal variables in Blom's approximation,
Φ⁻¹((n − ⅜) / (n + ¼)) (Blom, "Statistical Estimates and Transformed Beta-Variables", 1958).

The gradients, G bytes in k buckets, are added up by a ring (Thakur, Rabenseifner & Gropp, "Optimization of Collective
Communication Operations in MPICH", 2005; Patarasuk & Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of
Workstations", 2009) or, between GPUs, by the double binary tree (Sanders, Speck & Träff, "Two-Tree Algorithms for Full
Bandwidth Broadcast, Reduction and Scan", 2009) where that is quicker, as NCCL chooses:

    ring(n) = 2 (n − 1) / n · G / β  +  k · (2 (n − m) · λ_local + 2 (m − 1) · λ_link)
    tree(n) = 2 · G / β              +  k · (2 (n / m − 1) · λ_local + 2 log2(m) · λ_link)

with β the slowest link's bytes a second and λ the seconds of a hop; the counts of hops are those of NCCL's own tuning model
(`src/graph/tuning.cc`). A ring crosses each machine's network link once each way, so β does not shrink with w.

The exchange runs beside the backward pass, two thirds of the arithmetic, as far as it was seen to (ω) and no further:

    exposed(n) = max((1 − ω) · x, x − ⅔ · compute),   x = min(ring, tree)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from tune.scaling.rows import ExtractRow, TrainRow

BUCKET = 25 << 20  # bytes DistributedDataParallel exchanges at once
BACKWARD = 2 / 3  # of a step's arithmetic (Kaplan et al., "Scaling Laws for Neural Language Models", 2020)
FURTHEST = 4096  # workers up to which a fall of the efficiency is looked for
DRAWS = 200  # of the bootstrap

Terms = dict[str, float]
Row = TypeVar("Row", ExtractRow, TrainRow)
Model = TypeVar("Model")


@dataclass(frozen=True)
class Link:
    """A way between two workers."""

    bandwidth: float  # bytes a second
    latency: float  # seconds of a hop


# Of a GPU machine, cautiously, where no measurement spans two; NCCL's tuning table has 9.6 µs for a hop of a ring.
ASSUMED_LINK = Link(bandwidth=100e9 / 8, latency=10e-6)


@dataclass(frozen=True)
class Curve:
    """How one kind of work scales."""

    items: Callable[[int], float]  # comments or examples, by workers, in the time that `terms` add up to
    terms: Callable[[int], Terms]  # its seconds, by what they go into
    most: int | None = None  # workers that can take part at all; None for any number

    def throughput(self, workers: int) -> float:
        """Items a second."""
        return self.items(workers) / sum(self.terms(workers).values())

    def efficiency(self, workers: int) -> float:
        """Throughput over that of as many times one worker: in (0, 1]."""
        return self.throughput(workers) / (workers * self.throughput(1))

    def losses(self, workers: int) -> Terms:
        """The share of the workers' time that is lost to each term; together 1 − efficiency."""
        now, once = self.terms(workers), self.terms(1)
        total = sum(now.values())
        ideal = self.items(workers) / (self.items(1) * workers)
        return {name: (seconds - once[name] * ideal) / total for name, seconds in now.items()}

    def limit(self, workers: int) -> str | None:
        """The term that loses most; None where nothing is lost."""
        name, share = max(self.losses(workers).items(), key=lambda loss: loss[1])
        return name if share > 1e-9 else None

    def falls_under(self, level: float) -> int | None:
        """The fewest workers with an efficiency below a level; None where there are none up to `FURTHEST` or `most`."""
        counts = range(1, min(self.most or FURTHEST, FURTHEST) + 1)
        return next((workers for workers in counts if self.efficiency(workers) < level), None)


@dataclass(frozen=True)
class ExtractModel:
    """See the module's docstring."""

    start: float  # S, seconds
    row: float  # c, seconds a comment
    sharing: float  # d, seconds a comment for each other actor on the machine
    manifest: float  # μ, seconds a unit
    unit_rows: int  # r
    per_node: int  # w

    def slowed(self, workers: int) -> float:
        """Seconds a comment that the actors on one machine cost each other."""
        return self.sharing * (min(workers, self.per_node) - 1)

    def steady(self) -> Curve:
        """A comment for each actor, once all are at work."""
        return Curve(float, lambda workers: {"rows": self.row, "sharing": self.slowed(workers)})

    def job(self, rows: int) -> Curve:
        """The whole extraction of so many comments, start included."""
        units = -(-rows // self.unit_rows)

        def terms(workers: int) -> Terms:
            sharing, mine = self.slowed(workers), units / workers * self.unit_rows
            spare = (-(-units // workers) - units / workers) * self.unit_rows
            return {
                "start": self.start,
                "rows": mine * self.row,
                "sharing": mine * sharing,
                "last units": spare * (self.row + sharing),
                "manifest": self.manifest * units,
            }

        return Curve(lambda _: float(rows), terms)


@dataclass(frozen=True)
class TrainModel:
    """See the module's docstring."""

    fixed: float  # a, seconds a step
    example: float  # c, seconds an example
    sharing: float  # d, seconds an example for each other worker on the machine
    waiting: float  # σ, as a share of what a worker computes
    overlap: float  # ω, the share of the exchange that the backward pass hides
    local: Link  # the way between workers of one machine
    link: Link  # the way between machines
    bytes: int  # G
    per_node: int  # w
    tree: bool  # whether all-reduce may take the tree, as NCCL does

    def slowed(self, workers: int) -> float:
        """Seconds an example that the workers on one machine cost each other."""
        return self.sharing * (min(workers, self.per_node) - 1)

    def exchange(self, workers: int) -> tuple[float, float]:
        """Seconds of one step's all-reduce with nothing beside it: its volume's and its hops'."""
        if workers == 1:
            return 0.0, 0.0
        nodes, buckets = -(-workers // self.per_node), -(-self.bytes // BUCKET)
        bandwidth = self.local.bandwidth if nodes == 1 else min(self.local.bandwidth, self.link.bandwidth)
        hops = 2 * (workers - nodes) * self.local.latency + 2 * (nodes - 1) * self.link.latency
        ring = ring_volume(workers) * self.bytes / bandwidth, buckets * hops
        hops = 2 * (workers / nodes - 1) * self.local.latency + 2 * math.log2(nodes) * self.link.latency
        tree = 2 * self.bytes / bandwidth, buckets * hops
        return min(ring, tree, key=sum) if self.tree else ring

    def terms(self, workers: int, share: int) -> Terms:
        """Seconds of a step with so many examples for each worker."""
        compute = {"fixed": self.fixed, "examples": share * self.example, "sharing": share * self.slowed(workers)}
        alone = sum(compute.values())
        volume, hops = self.exchange(workers)
        whole = volume + hops
        exposed = max((1 - self.overlap) * whole, whole - BACKWARD * alone) / whole if whole else 0.0
        waiting = self.waiting * expected_largest(workers) * alone
        return compute | {"volume": exposed * volume, "hops": exposed * hops, "waiting": waiting}

    def weak(self, share: int) -> Curve:
        """Every worker keeps its number of examples, so a step's batch grows with them."""
        return Curve(lambda workers: float(workers * share), lambda workers: self.terms(workers, share))

    def strong(self, batch: int) -> Curve:
        """A step's batch stays as it is and is shared out; the slowest worker has ⌈batch / n⌉ of it."""
        return Curve(lambda _: float(batch), lambda workers: self.terms(workers, -(-batch // workers)), batch)


def ring_volume(workers: int) -> float:
    """What each worker sends in a ring all-reduce, in sizes of what is added up: 2 (n − 1) / n."""
    return 2 * (workers - 1) / workers


def expected_largest(count: int) -> float:
    """Of so many standard normal variables, by Blom's approximation; 0 for one."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def fit_extract(rows: Sequence[ExtractRow]) -> ExtractModel:
    """The model of one machine kind's measurements, by least squares on relative errors."""
    columns, seconds = [[1.0, row.per_node - 1] for row in rows], [median(row.unit) / row.rows for row in rows]
    each, sharing = nonnegative_least_squares(columns, seconds)
    return ExtractModel(
        start=max(row.startup for row in rows),
        row=each,
        sharing=sharing,
        manifest=fmean(row.manifest for row in rows),
        unit_rows=rows[0].rows,
        per_node=max(row.per_node for row in rows),
    )


def fit_train(rows: Sequence[TrainRow], link: Link, tree: bool) -> TrainModel:
    """The model of one machine kind's measurements, by least squares on relative errors.

    Args:
        link: stands for the way between machines where all rows are of one, and within one where no two workers shared it.
    """
    columns = [[1.0, row.share, row.share * (row.per_node - 1)] for row in rows]
    fixed, example, sharing = nonnegative_least_squares(columns, [median(row.alone) for row in rows])
    local = _fit_link([row for row in rows if row.workers > 1 and row.nodes == 1], 0.0)
    between = _fit_link([row for row in rows if row.nodes > 1], local.latency if local else 0.0) or link
    overlap, waiting = _overlap_and_waiting([row for row in rows if row.workers > 1])
    return TrainModel(
        fixed=fixed,
        example=example,
        sharing=sharing,
        waiting=waiting,
        overlap=overlap,
        local=local or between,
        link=between,
        bytes=rows[0].bytes,
        per_node=max(row.per_node for row in rows),
        tree=tree,
    )


def _fit_link(rows: Sequence[TrainRow], local: float) -> Link | None:
    """Bandwidth and latency from all-reduces of whole gradients and of single numbers; `local` is a hop's within a machine."""
    if not rows:
        return None
    columns, seconds = [], []
    for row in rows:
        inside, hops = 2 * (row.workers - row.nodes), 2 * (row.nodes - 1)
        if row.nodes == 1:
            inside, hops = 0, inside
        for samples, size in ((row.exchange, row.bytes), (row.ping, 4)):
            buckets = -(-size // BUCKET)
            columns.append([ring_volume(row.workers) * size, buckets * hops])
            seconds.append(max(median(samples) - buckets * inside * local, 1e-9))
    each, hop = nonnegative_least_squares(columns, seconds)
    return Link(1 / max(each, 1e-15), hop)


def _overlap_and_waiting(rows: Sequence[TrainRow]) -> tuple[float, float]:
    """ω and σ. What a step takes longer than alone is exchange up to the exchange's own length, and waiting beyond."""
    if not rows:
        return 0.0, 0.0
    hidden, waited = [], []
    for row in rows:
        alone, whole = median(row.alone), median(row.exchange)
        longer = max(median(row.step) - alone, 0.0)
        hidden.append(1 - min(longer / whole, 1.0))
        waited.append(max(longer - whole, 0.0) / (expected_largest(row.workers) * alone))
    return fmean(hidden), fmean(waited)


def nonnegative_least_squares(columns: ArrayLike, values: ArrayLike) -> list[float]:
    """The coefficients, none below zero, with the least sum of squared relative errors; values are above zero."""
    found, _ = nnls(np.asarray(columns) / np.asarray(values)[:, None], np.ones(np.shape(values)))
    return [float(value) for value in found]


def bootstrap(rows: Sequence[Row], fit: Callable[[Sequence[Row]], Model]) -> list[Model]:
    """Models of rows whose samples are drawn anew: what measuring noise alone does to the model."""
    random = np.random.default_rng(0)
    return [fit([row.resampled(random) for row in rows]) for _ in range(DRAWS)]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The middle 90 %."""
    low, high = np.percentile(np.fromiter(values, np.float64), (5, 95))
    return float(low), float(high)
