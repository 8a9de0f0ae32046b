"""Fields whose value is a list of labels, each in it once at most: which lists there are, and how they go on."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

from pydantic import Field, model_validator

from pipeline.base.config import Strict

T = TypeVar("T")


class Begun(NamedTuple):
    """What matters of the beginning of a list: how many labels it has, and which may not follow.

    Attributes:
        seen: the number of the last one where they stand in the task's order, else those of all.
    """

    size: int = 0
    seen: frozenset[int] = frozenset()


class ListRule(Strict):
    """How a list of a field's values may look."""

    min: int = Field(0, ge=0, description="labels, at least")
    max: int | None = Field(None, ge=1, description="labels, at most; null: all there are")
    order: Literal["listed", "any"] = Field("listed", description="of the labels: as the task lists them, or any")

    @model_validator(mode="after")
    def _ordered(self) -> ListRule:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is larger than max ({self.max})")
        return self

    def most(self, labels: int) -> int:
        """The length of the longest list of so many labels."""
        return labels if self.max is None else min(self.max, labels)

    def count(self, labels: int) -> int:
        """How many lists there are."""
        ways = math.comb if self.order == "listed" else math.perm
        return sum(ways(labels, size) for size in range(self.min, self.most(labels) + 1))

    def every(self, labels: Sequence[T]) -> Iterator[tuple[T, ...]]:
        """All lists, the shortest first."""
        choose = itertools.combinations if self.order == "listed" else itertools.permutations
        sizes = range(self.min, self.most(len(labels)) + 1)
        return itertools.chain.from_iterable(choose(labels, size) for size in sizes)

    def draw(self, labels: Sequence[T], rng: random.Random, label: int) -> tuple[T, ...]:
        """One at random, with some label in it unless it is empty."""
        size = rng.randint(self.min, self.most(len(labels)))
        others = [i for i in range(len(labels)) if i != label]
        drawn = [label, *rng.sample(others, size - 1)] if size else []
        return tuple(labels[i] for i in (sorted(drawn) if self.order == "listed" else rng.sample(drawn, len(drawn))))

    def following(self, begun: Begun, labels: int) -> Iterator[tuple[int, Begun]]:
        """The numbers of the labels that may come next, and what the list has then begun with.

        Two beginnings that may go on alike are the same, so their number stays small: without a bound to count to, only
        `min` of them are counted.
        """
        if begun.size >= self.most(labels) and self.most(labels) < labels:
            return
        count = begun.size + 1 if self.most(labels) < labels else min(begun.size + 1, self.min)
        for label in range(max(begun.seen, default=-1) + 1 if self.order == "listed" else 0, labels):
            if self.order == "listed" and labels - 1 - label >= self.min - count:
                yield label, Begun(count, frozenset({label}))
            elif self.order == "any" and label not in begun.seen:
                yield label, Begun(count, begun.seen | {label})
