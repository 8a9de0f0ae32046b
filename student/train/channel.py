"""The way between a training's first worker and the driver: metrics one way, the wish to stop the other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from pipeline.base.tracking import MetricsRow  # with MLflow, which a worker has no use for

SEND_EVERY = 0.5  # seconds between two parcels


class _Channel:
    """Holds rows of metrics until the driver takes them."""

    def __init__(self) -> None:
        self._rows: list[MetricsRow] = []
        self._stopping = False

    def put(self, rows: list[MetricsRow]) -> bool:
        """Leaves rows; returns whether the driver wants the training to stop."""
        self._rows += rows
        return self._stopping

    def take(self) -> list[MetricsRow]:
        """What was left since the last time."""
        rows, self._rows = self._rows, []
        return rows

    def stop(self) -> None:
        """Asks the training to stop."""
        self._stopping = True


def open_channel() -> Any:
    """A new channel, as the handle of an actor on the driver's machine: it must not go with a worker's."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Channel).remote()


class Sender:
    """The worker's end: a step and its metrics at a time, sent a few together.

    Args:
        channel: None for workers that nobody listens to.
    """

    def __init__(self, channel: Any | None) -> None:
        self._channel = channel
        self._rows: list[MetricsRow] = []
        self._sent = time.perf_counter()
        self.stopping = False

    def add(self, step: int, row: dict[str, float]) -> None:
        """Takes one row, and sends what waits once in a while."""
        self._rows.append((step, row))
        if time.perf_counter() - self._sent > SEND_EVERY:
            self.send()

    def send(self) -> None:
        """Sends what waits, and hears whether to stop."""
        if self._channel is not None:
            self.stopping = ray.get(self._channel.put.remote(self._rows))
        self._rows, self._sent = [], time.perf_counter()
