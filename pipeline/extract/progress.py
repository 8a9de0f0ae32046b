"""The progress of an extraction: a live display on a terminal, a line a minute in a log, and metrics in MLflow."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

import ray
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeline.base.console import console
from pipeline.base.signals import StopRequest
from pipeline.base.tracking import Tracking
from pipeline.extract.monitor import Status

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds between two looks at the monitor
TRACK_EVERY = 10.0  # seconds between two rows of metrics
LOG_EVERY = 60.0  # seconds between two log lines where there is no terminal
RECENT = 60.0  # seconds that a pace looks back, where it knows enough of them


class Pace:
    """How fast a count grows of late. What came before its first growth, such as the start of an engine, does not matter.

    Args:
        actors: how many add to the count, each a unit at a time. They may all do so at once, so a pace is told over a multiple
            of as many changes.
    """

    def __init__(self, actors: int) -> None:
        self._actors, self._changes = actors, deque[tuple[float, int]]()  # when the count was seen to have grown, and to what

    def see(self, now: float, count: int) -> None:
        """Takes a look at the count, at this time in seconds."""
        if count > (self._changes[-1][1] if self._changes else 0):
            self._changes.append((now, count))
        while len(self._changes) > self._actors + 1 and self._changes[1][0] < now - RECENT:
            self._changes.popleft()

    def per_second(self, now: float) -> float | None:
        """The growth a second; None until it is known. It falls while units take longer than those before."""
        rounds = (len(self._changes) - 1) // self._actors
        if rounds < 1:
            return None
        (first, before), (last, count) = self._changes[-1 - rounds * self._actors], self._changes[-1]
        growth = count - before
        return min(growth / (last - first), growth * (1 + 1 / rounds) / (now - first))


class Watch:
    """Shows what the monitor knows until the block ends, and passes on the wish to stop.

    Args:
        monitor: the handle of a `pipeline.extract.monitor.Monitor`.
    """

    def __init__(self, monitor: Any, stop: StopRequest, total: int, before: int, actors: int, tracking: Tracking) -> None:
        self._monitor, self._stop, self._tracking = monitor, stop, tracking
        self._total, self._before, self._actors = total, before, actors
        self._status, self._pace = Status(0, 0, []), Pace(actors)
        self._started = time.monotonic()
        self._over, self._thread = threading.Event(), threading.Thread(target=self._look, daemon=True)
        self._bar = Progress(
            TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("extracting", total=total, completed=before, note="")

    @property
    def rows(self) -> int:
        """Examples committed in this run."""
        return self._status.rows

    @property
    def seconds(self) -> float:
        """Since the watch began."""
        return time.monotonic() - self._started

    def __enter__(self) -> Watch:
        self._live = Live(self._view(), console=console, refresh_per_second=2, transient=True)
        if console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            self._status = ray.get(self._monitor.status.remote())
            self._track()
        self._live.stop()
        failed = RunStatus.FAILED if kind is not None else RunStatus.FINISHED
        self._tracking.end(RunStatus.KILLED if self._stop else failed)

    def _look(self) -> None:
        tracked = logged = time.monotonic()
        told = False
        while not self._over.wait(LOOK_EVERY):
            try:
                if self._stop and not told:
                    self._monitor.stop.remote()
                    told = True
                self.see(ray.get(self._monitor.status.remote(), timeout=LOOK_EVERY))
            except ray.exceptions.RayError:  # busy, or gone with the run itself, which will say why
                continue
            now = time.monotonic()
            self._live.update(self._view())
            if now - tracked > TRACK_EVERY:
                self._track()
                tracked = now
            if now - logged > LOG_EVERY and not console.is_terminal:
                log.info("%s", self.line())
                logged = now

    def see(self, status: Status) -> None:
        """Takes what the monitor says."""
        self._status = status
        self._pace.see(self.seconds, status.rows + status.set_aside)

    def line(self) -> str:
        """Rows done and left, speed of late, time left and what was set aside, in one line."""
        done, aside, seconds = self._before + self.rows, self._status.set_aside, self.seconds
        rate = self._pace.per_second(seconds) or (self.rows + aside) / seconds
        left = self._total - done - aside
        eta = f"{_time(left / rate)} left" if rate else "no answer yet"
        return f"{done:,} of {self._total:,} answers, {rate:.1f}/s, {eta}, {aside:,} set aside"

    def _view(self) -> Group:
        done = self._before + self.rows + self._status.set_aside
        self._bar.update(self._task, completed=done, note=self.line().split(" answers, ")[1])
        actors = Table(box=None, show_header=False)
        for name, state, since in self._current():
            actors.add_row(f"actor {name}", state, f"{since:.0f} s")
        return Group(self._bar, actors)

    def _current(self) -> list[tuple[str, str, float]]:
        """The actors heard of last: those before them are dead and were replaced."""
        return sorted(sorted(self._status.actors, key=lambda actor: actor[2])[: self._actors])

    def _track(self) -> None:
        rate = self.rows / self.seconds
        metrics = {"rows": self._before + self.rows, "set_aside": self._status.set_aside, "rows_per_second": rate}
        try:
            self._tracking.log([(int(self.seconds), {name: float(value) for name, value in metrics.items()})])
        except MlflowException as error:  # no reason to stop answering, nor to stop passing on a signal
            log.warning("MLflow does not take the metrics: %s", error)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
