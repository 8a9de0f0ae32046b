"""How fast an extraction goes with so many teacher actors: `retort extract`'s own units and actors, timed by their commits."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import numpy as np
import ray

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.tracking import Tracking
from pipeline.extract.extract import finish, prepare_run, run_units
from pipeline.extract.monitor import Commit, PlainMonitor, UnitReport
from pipeline.shards.files import shard_path
from tune.config import TuneSettings
from tune.scaling.rows import ExtractRow

UNITS_PER_WORKER = 6  # that each actor extracts; its first one starts it up
PATIENCE = 900.0  # seconds an actor that is up waits for the others


class Gate(PlainMonitor):
    """A monitor that answers an actor's first commit when all actors have made theirs.

    Engines take seconds more or less to start: without it the first one up may do the others' units.
    """

    def __init__(self, actors: int) -> None:
        super().__init__()
        self._actors_awaited, self._open = actors, asyncio.Event()

    async def report(self, report: UnitReport) -> bool:  # type: ignore[override]
        """See `PlainMonitor`; an actor waits for its answer."""
        stopping = super().report(report)
        if len({commit.actor for commit in self._commits}) >= self._actors_awaited or stopping or report.failure:
            self._open.set()
        if report.committed:
            with suppress(TimeoutError):  # an actor that never comes must not hold the others for ever
                await asyncio.wait_for(self._open.wait(), PATIENCE)
        return self._stopping

    async def stop(self) -> None:  # type: ignore[override]
        """See `PlainMonitor`; nobody waits any more."""
        super().stop()
        self._open.set()


class Untracked(Tracking):
    """In place of an MLflow run: a measurement's extraction is not one of the user's."""

    def __init__(self) -> None:
        pass

    def log(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Forgets them."""

    def end(self, *_: Any, **__: Any) -> None:
        """Has nothing to close."""


def measure_extraction(config: TuneSettings, workers: int, most: int, folder: str) -> ExtractRow:
    """Extracts a sample of the comments with so many actors, each `UNITS_PER_WORKER` units of it.

    Plan and calibration are made for the largest number of actors once, and are not timed: they do not depend on it.

    Args:
        folder: to work in; what an earlier measurement left there is used or written over.

    Raises:
        UserError: there are too few comments, or the extraction itself cannot go on.
        Stopped: a signal ended it early.
    """
    size, each = config.extract.rows_per_unit, UNITS_PER_WORKER
    limit = most * each * size
    changes = {
        "out": storage.join(folder, str(limit)),
        "comments": config.comments.model_copy(update={"limit": limit}),
        "teacher": config.teacher.model_copy(update={"actors": workers}),
    }
    extraction, plan, compiled = prepare_run(config.model_copy(update=changes))
    if plan.kept < limit:
        raise UserError(
            f"{most} actors × {each} units × {size} comments are {limit:,}, and {plan.kept:,} comments pass the filters: give "
            f"more comments, or lower extract.rows_per_unit to {max(1, plan.kept // (most * each))}"
        )
    plan = plan.model_copy(update={"units": workers * each, "kept": workers * each * size})
    for unit in range(most * each):
        storage.delete(shard_path(extraction.shards, unit))
    began = time.time()
    gate = ray.remote(num_cpus=0)(Gate)
    commits = run_units(extraction, plan, Untracked, lambda here: gate.options(scheduling_strategy=here).remote(workers))
    ended = time.perf_counter()
    finish(extraction, compiled, plan)
    manifest = (time.perf_counter() - ended) / plan.units
    return row_of(commits, began, workers, size, manifest)


def row_of(commits: list[Commit], began: float, workers: int, rows: int, manifest: float) -> ExtractRow:
    """The measurement that the commits of an extraction make.

    An actor's first commit ends its start, and the last of these opens the gate: from then on units count.

    Args:
        manifest: seconds for a unit's line in the manifest.

    Raises:
        UserError: no unit was left when all were up, or an actor died.
    """
    actors = {commit.actor for commit in commits}
    times = [[commit.time for commit in commits if commit.actor == actor] for actor in actors]
    if len(times) != workers:
        raise UserError(f"{len(times)} actors committed units where {workers} were asked for: one died, or got no unit at all")
    ready = max(first for first, *_ in times)
    unit = [float(seconds) for mine in times for seconds in np.diff([ready, *(at for at in mine if at > ready)])]
    if not unit:
        raise UserError("no unit was left when all actors were up: measure more comments a unit (extract.rows_per_unit)")
    startup = ready - began - float(np.median(unit))
    nodes = len({actor.partition("/")[0] for actor in actors})
    return ExtractRow(workers=workers, nodes=nodes, rows=rows, unit=unit, startup=max(startup, 0.0), manifest=manifest)
