"""What the actors of an extraction do, in one place: they report to it, the driver looks, and it can ask them to stop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class UnitReport:
    """What one actor says.

    Attributes:
        actor: its name.
        state: what it does from now on.
        rows: examples it has committed since its last report.
        set_aside: rows it has set aside since.
        failure: what the user has to mend before it can go on.
        committed: whether a unit has its shard now.
    """

    actor: str
    state: str
    rows: int = 0
    set_aside: int = 0
    failure: str = ""
    committed: bool = False


@dataclass(frozen=True)
class Status:
    """All reports so far.

    Attributes:
        rows: examples committed.
        set_aside: rows set aside.
        actors: name, state and seconds in it of each actor, in the order they came.
        failure: of the first actor that failed.
    """

    rows: int
    set_aside: int
    actors: list[tuple[str, str, float]]
    failure: str = ""


@dataclass(frozen=True)
class Commit:
    """A unit that has its shard.

    Attributes:
        actor: the name of the actor that wrote it; what is before the slash is its machine's.
        time: when the monitor heard of it, in seconds of its own clock since the epoch.
    """

    actor: str
    time: float


class PlainMonitor:
    """What a Ray actor beside the driver keeps."""

    def __init__(self) -> None:
        self._rows = self._set_aside = 0
        self._actors: dict[str, tuple[str, float]] = {}
        self._stopping = False
        self._failure = ""
        self._commits: list[Commit] = []

    def report(self, report: UnitReport) -> bool:
        """Takes a report; true where the actor shall begin nothing more."""
        self._rows += report.rows
        self._set_aside += report.set_aside
        self._actors[report.actor] = report.state, time.time()
        self._failure = self._failure or report.failure
        if report.committed:
            self._commits.append(Commit(report.actor, time.time()))
        return self._stopping

    def stop(self) -> None:
        """Lets every actor finish what it has begun."""
        self._stopping = True

    def status(self) -> Status:
        """All reports so far."""
        now = time.time()
        actors = [(name, state, now - since) for name, (state, since) in self._actors.items()]
        return Status(self._rows, self._set_aside, actors, self._failure)

    def commits(self) -> list[Commit]:
        """The units committed so far, in the order they were."""
        return self._commits


Monitor = ray.remote(num_cpus=0)(PlainMonitor)


def open_monitor(here: NodeAffinitySchedulingStrategy) -> Any:
    """A new monitor on the driver's machine, as the handle of an actor."""
    return Monitor.options(scheduling_strategy=here).remote()
