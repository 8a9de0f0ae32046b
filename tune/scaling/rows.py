"""What a measurement of scaling leaves: raw seconds by stage and number of workers, and the figures that follow from them.

Every figure is of medians: other work on a machine lengthens a few samples a lot.
"""

from __future__ import annotations

from statistics import median
from typing import Self

import numpy as np

from pipeline.base.config import Strict


class _Row(Strict):
    """One measurement, in seconds."""

    workers: int  # teacher actors, or workers of the training
    nodes: int  # machines they ran on
    startup: float  # does not count: until all are at work with their models; of a training job, all around its steps
    busy: float = 0.0  # share of the driver's machine that other work took before
    command: float = 0.0  # from the command's own start until it had Ray, which every command takes

    @property
    def per_node(self) -> int:
        """Workers on the fullest machine."""
        return -(-self.workers // self.nodes)


class ExtractRow(_Row):
    """An extraction with some number of teacher actors."""

    rows: int  # answers of one unit
    unit: list[float]  # between two commits of one actor, while all were at work
    manifest: float  # for the manifest, for each unit in it

    @property
    def items_per_second(self) -> float:
        """Answers, by all actors together."""
        return self.workers * self.rows / median(self.unit)

    def resampled(self, random: np.random.Generator) -> Self:
        """The same row with its samples drawn anew, with replacement (Efron's bootstrap, 1979)."""
        return self.model_copy(update={"unit": _drawn(self.unit, random)})


class TrainRow(_Row):
    """Training steps with some number of workers, each of which has the same number of a step's examples."""

    share: int  # examples of one worker in a step
    step: list[float]
    alone: list[float]  # a step on the same examples in which workers keep their gradients to themselves; their mean
    exchange: list[float]  # all-reduce of one step's gradients with nothing beside it; empty for one worker
    ping: list[float]  # all-reduce of a single number; empty for one worker
    bytes: int  # of one step's gradients

    @property
    def items_per_second(self) -> float:
        """Examples, by all workers together."""
        return self.workers * self.share / median(self.step)

    @property
    def communication_share(self) -> float:
        """The share of a step that goes into exchanging gradients: what it takes longer than without."""
        return max(0.0, 1 - median(self.alone) / median(self.step))

    @property
    def bytes_sent(self) -> int:
        """By one worker in a step, of a ring all-reduce: 2 (n − 1) / n of the gradients."""
        return 2 * (self.workers - 1) * self.bytes // self.workers

    def resampled(self, random: np.random.Generator) -> Self:
        """The same row with its samples drawn anew, with replacement (Efron's bootstrap, 1979)."""
        steps = random.integers(len(self.step), size=len(self.step))  # a step and its twin without exchange stay together
        drawn = {"step": [self.step[i] for i in steps], "alone": [self.alone[i] for i in steps]}
        others = {name: _drawn(getattr(self, name), random) for name in ("exchange", "ping")}
        return self.model_copy(update=drawn | others)


class Rows(Strict):
    """All that was measured, by stage, as scale.json has it."""

    extract: list[ExtractRow] = []
    train: list[TrainRow] = []


def _drawn(samples: list[float], random: np.random.Generator) -> list[float]:
    return [samples[i] for i in random.integers(len(samples), size=len(samples))] if samples else []
