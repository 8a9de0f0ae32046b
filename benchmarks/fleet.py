"""How many units a second one driver hands out to so many actors, each as fast as an H100, and what it has for itself then.

All around the actors is the product's. Each has two units at a time, as ever, and sleeps as long as one of 512 texts takes such
a card by `retort plan`, one after the other. Where the rate stays below the cards', they would wait for the driver, or here
for a machine with so many processes on it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import psutil
import ray

from benchmarks.scale import own_memory
from pipeline.base.runtime import start_ray
from pipeline.config import TeacherConfig
from pipeline.extract.monitor import UnitReport

if TYPE_CHECKING:
    from pipeline.extract.monitor import Commit

ROWS = 512  # texts of a unit


class Sleeper:
    """In place of an extraction's actor: reports as that one does, and sleeps for a unit."""

    def __init__(self, extraction: Any, monitor: Any) -> None:
        self._seconds, self._monitor, self._name = extraction.seconds, monitor, f"machine/{os.getpid()}"
        self._engine = threading.Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Does the batch's units; returns the rows of each."""
        units = batch["unit"].tolist()
        for unit in units:
            ray.get(self._monitor.report.remote(UnitReport(self._name, f"unit {unit}")))
            with self._engine:
                time.sleep(self._seconds)
            ray.get(self._monitor.report.remote(UnitReport(self._name, "idle", ROWS, committed=True)))
        return {"unit": units, "rows": [ROWS] * len(units)}


def hand_out(actors: int, units: int, rate: float) -> list[Commit]:
    """An extraction of so many units; each actor waits with its second one until all have done their first."""
    from pipeline.extract import extract
    from tune.scaling.extraction import Gate, Untracked

    extract.UnitExtractor = Sleeper  # type: ignore[misc, assignment]
    gate: Any = ray.remote(num_cpus=0)(Gate)
    plan = SimpleNamespace(units=units, kept=units * ROWS, source=SimpleNamespace(rows_per_unit=ROWS))
    teacher, seconds = TeacherConfig(actors=actors, cpus=1 / 256), ROWS / rate
    with tempfile.TemporaryDirectory() as folder:
        extraction: Any = SimpleNamespace(shards=folder, teacher=teacher, samples=1, seconds=seconds)
        return extract.run_units(
            extraction,
            plan,  # type: ignore[arg-type]
            Untracked,
            lambda here: gate.options(scheduling_strategy=here).remote(actors),
        )


def units_per_second(commits: list[Commit], actors: int) -> float:
    """From when all actors are up until the first has nothing left to do."""
    firsts = {commit.actor: commit.time for commit in reversed(commits)}
    ready = max(firsts.values())
    times = sorted(commit.time for commit in commits if commit.time > ready)
    times = times[: len(times) - 2 * actors]
    return len(times) / (times[-1] - ready)


@click.command(help=__doc__)
@click.option("--actors", default=64, show_default=True)
@click.option("--units", default=10_000, show_default=True)
@click.option("--rate", default=295.0, show_default=True, help="Texts a second of one actor.")
def main(actors: int, units: int, rate: float) -> None:
    """Prints the figures."""
    if units < 6 * actors:
        raise click.UsageError(f"{actors} actors need {6 * actors} units at least: each one's first and last do not count")
    start_ray()
    driver = psutil.Process()
    memory, cpu = own_memory(driver.pid), sum(driver.cpu_times()[:2])
    commits = hand_out(actors, units, rate)
    cpu, after = sum(driver.cpu_times()[:2]) - cpu, own_memory(driver.pid)
    print(
        f"{units_per_second(commits, actors):.1f} units a second of the {actors * rate / ROWS:.1f} that the actors can do, "
        f"{1000 * cpu / len(commits):.1f} ms of the driver's CPU for each; it has {memory:.0f} MiB before and {after:.0f} after"
    )


if __name__ == "__main__":
    main()
