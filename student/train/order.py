"""Which examples each step of a training sees: a function of seed, epoch and step alone, so a position is two numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UserError
from student.config import TrainConfig

WINDOW = 64  # batches sorted by length together: enough that a batch's lengths are close, few enough to stay random


@dataclass(frozen=True)
class Order:
    """Global batches of examples of like length, from a permutation drawn from (seed, epoch).

    The last, incomplete batch of an epoch is left out; the next epoch's permutation leaves out others.

    Attributes:
        lengths: int32 [N], tokens of each example.
        config: of the training.
    """

    lengths: NDArray[np.int32]
    config: TrainConfig

    @property
    def steps(self) -> int:
        """Steps of an epoch.

        Raises:
            UserError: there are fewer examples than one batch takes, or fewer in a batch than parts it is cut in.
        """
        parts = self.config.most_workers * self.config.accumulation
        if len(self.lengths) < self.config.step_examples or self.config.step_examples < parts:
            raise UserError(
                f"{len(self.lengths):,} training examples, batches of {self.config.step_examples}, {parts} parts of a batch "
                "(workers × accumulation): each batch needs that many examples, and each part at least one of them"
            )
        return len(self.lengths) // self.config.step_examples

    def epoch(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """The examples of each step of an epoch, counted from 1."""
        random = np.random.default_rng([self.config.seed, epoch])
        batches, size = [], self.config.step_examples
        for examples in self._passes(epoch, random):
            for start in range(0, len(examples), WINDOW * size):
                window = examples[start : start + WINDOW * size]
                by_length = window[np.argsort(self.lengths[window], kind="stable")].reshape(-1, size)
                batches.append(random.permutation(by_length))
        yield from np.concatenate(batches)[: self.steps]

    def _passes(self, epoch: int, random: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Whole batches of examples in the order they are drawn: all once, or, while the data grow, the first several times.

        Sorted by length together, two passes would put an example into a batch more than once.
        """
        share, size = self.config.growth[min(epoch, len(self.config.growth)) - 1], self.config.step_examples
        known = np.arange(len(self.lengths))
        if share < 1:
            first = max(size, round(share * len(known)))
            known = np.random.default_rng([self.config.seed]).permutation(known)[:first]
        for _ in range(-(-self.steps // (len(known) // size))):
            yield random.permutation(known)[: len(known) // size * size]


def parts(batch: NDArray[np.int64], rank: int, workers: int, accumulation: int) -> list[NDArray[np.int64]]:
    """One worker's share of a global batch, in as many parts as it runs one after another."""
    return np.array_split(batch[rank::workers], accumulation)
