"""What comes in against what the student was measured on: the mix of its answers, and how long texts are."""

from __future__ import annotations

import bisect
from collections import deque

import numpy as np
from numpy.typing import NDArray

from pipeline.task.task import Task
from pipeline.task.values import Value, labels_of
from student.evaluate.evidence import LENGTH, Held

LATEST = 1000  # texts that are compared
FEWEST = 100  # of them, before anything is said
SMALLEST = 0.5  # of a text, that each bin has besides, so that an empty one is no infinite surprise


class Drift:
    """The latest texts and answers, by bins.

    The population stability index Σ (p − q) ln(p / q) is 0 for equal mixes; above 0.25 people call it a shift.
    """

    def __init__(self, held: Held, task: Task) -> None:
        self._places = {name: {repr(value): i for i, value in enumerate(values)} for name, values in task.fields.items()}
        self._cuts, self._expected = held.cuts, {name: np.array(counts) for name, counts in held.mix.items()}
        self._latest: dict[str, deque[int]] = {name: deque(maxlen=LATEST) for name in held.mix}

    def note(self, text: str, values: dict[str, Value]) -> None:
        """Counts an answer."""
        for name, value in values.items():
            self._latest[name].extend(self._places[name][repr(label)] for label in labels_of(value))
        self._latest[LENGTH].append(bisect.bisect(self._cuts, len(text)))

    def index(self, name: str) -> float:
        """The population stability index of a field's values, or of `LENGTH`; 0 while there are few texts."""
        places = self._latest[name]
        if len(places) < FEWEST:
            return 0.0
        found = np.bincount(places, minlength=len(self._expected[name]))
        expected, now = _shares(self._expected[name]), _shares(found)
        return float(((now - expected) * np.log(now / expected)).sum())

    @property
    def names(self) -> list[str]:
        """Of what is compared."""
        return list(self._latest)


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray((counts + SMALLEST) / (counts + SMALLEST).sum())
