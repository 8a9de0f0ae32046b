"""`retort extract` from an OpenAI-compatible API: comments to shards, with calls side by side in one process.

Each answer is on disk before anything else is done with it. A killed run loses the calls in flight, and no other is made again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pipeline.base import storage
from pipeline.base.console import progress
from pipeline.base.errors import UserError
from pipeline.base.signals import Stopped, StopRequest
from pipeline.base.tracking import Tracking, tracking_uri
from pipeline.comments.plan import read_unit
from pipeline.config import PipelineSettings
from pipeline.extract.fitted import Fitted, fit
from pipeline.extract.journal import Journal, Place
from pipeline.extract.votes import answer_and_votes
from pipeline.shards.files import committed_units, write_shard
from pipeline.shards.manifest import Manifest, read_footers, write_manifest
from pipeline.shards.shares import capture_votes
from pipeline.task.compiled import require_same
from pipeline.teacher.asker import Asker, may_try_again
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.spending import Spending
from pipeline.teacher.usage import Usage

log = logging.getLogger(__name__)


def extract_from_endpoint(config: PipelineSettings) -> Manifest:
    """Runs the whole stage in `config.out` and returns the manifest. What is already there is not asked again.

    Raises:
        UserError: anything the user can mend; among it an API that fails again and again.
        Stopped: a signal or the budget ended it early.
    """
    teacher, samples = config.teacher, config.extract.samples_per_comment
    if samples > 1 and not teacher.temperature:
        raise UserError("extract.samples_per_comment: samples without a teacher.temperature would all be the same answer")
    fitted = fit(config)
    task = fitted.compiled.task
    model = teacher.model or task.teacher
    if not model:
        raise UserError("no teacher given: name the API's model with --teacher, or in the task")
    identity: dict[str, Any] = {"model": model, "engine": teacher.engine, "url": teacher.url}
    identity |= {"temperature": teacher.temperature, "samples_per_comment": samples}
    endpoint = Endpoint(model, teacher, task)
    record = storage.join(fitted.shards, "teacher.json")
    if storage.exists(record):
        require_same(storage.read_json(record), identity, fitted.shards, "this extraction")
    storage.write_json(record, identity)
    run = _Run(config, fitted, endpoint, identity)
    settings = config.model_dump(mode="json", include={"task", "out", "teacher", "comments", "extract"})
    uri = tracking_uri(config.tracking.uri, str(config.out))
    if run.todo:
        with Tracking.start(uri, config.tracking.experiment, "extract", settings, "extraction") as tracking:
            asyncio.run(run.ask_all(tracking))
    spent = vars(run.spending.spent) | {"cost": run.spending.spent.cost(teacher)}
    manifest = write_manifest(fitted.shards, fitted.plan.units, fitted.about() | {"teacher": identity | {"spent": spent}})
    storage.sweep(fitted.shards)
    storage.delete(run.journal)  # what a run left that was killed between a shard and the deletion of its answers
    log.info("%s answers, %s set aside: %s", f"{manifest.rows:,}", f"{manifest.set_aside:,}", run.spending)
    return manifest


class _Run:
    """The calls of one run."""

    def __init__(self, config: PipelineSettings, fitted: Fitted, endpoint: Endpoint, identity: dict[str, Any]) -> None:
        self._fitted, self._identity = fitted, identity
        self._samples, self._requests = config.extract.samples_per_comment, config.teacher.requests
        self.journal = storage.join(storage.absolute(str(config.out)), "answers")
        self._journal = Journal(self.journal)
        committed = set(committed_units(fitted.shards))
        self.todo = [unit for unit in range(fitted.plan.units) if unit not in committed]
        # Units are asked one after another, so the first one alone may have answers that no shard holds.
        paid = [Usage(**record["spent"]) for unit in self.todo[:1] for record in self._journal.read(unit).values()]
        self._done = 0
        for footer in read_footers(fitted.shards, sorted(committed)):
            self._done += footer.rows
            paid.append(Usage(**footer.facts["spent"]))
        self.spending = Spending(config.teacher, sum(paid, Usage()), endpoint.bound(fitted.compiled.task.comments.max_tokens))
        self._asker = Asker(endpoint, self.spending)

    async def ask_all(self, tracking: Tracking) -> None:
        """Asks what is not answered yet, unit by unit.

        Raises:
            UserError: the API fails again and again, or refuses all calls.
            Stopped: a signal or the budget ended it.
        """
        with StopRequest("finishing the calls in flight") as stop, progress("asking", self._fitted.plan.kept) as (bar, task):

            def show(records: int) -> None:
                answered = self._done + records // self._samples
                bar.update(task, completed=answered, note=str(self.spending))
                if stop:
                    self._asker.ended = self._asker.ended or "a signal asked for it"

            for unit in self.todo:
                await self._unit(unit, show)
                tracking.log([(unit, {"rows": float(self._done), "cost": self.spending.cost} | _floats(self.spending.spent))])
                log.info("unit %s of %s: %s", unit + 1, self._fitted.plan.units, self.spending)

    async def _unit(self, unit: int, show: Callable[[int], None]) -> None:
        """Asks what is missing of one unit, and commits it once all is there."""
        started, rows, records = time.perf_counter(), read_unit(self._fitted.comments, unit), self._journal.read(unit)
        texts = rows["text"].to_pylist()
        places = ((row, sample) for row in range(len(rows)) for sample in range(self._samples))
        todo = (place for place in places if place not in records or may_try_again(records[place]))

        async def work() -> None:
            for place in todo:
                show(len(records))
                if self._asker.ended:
                    return
                paid = Usage(**records.get(place, {"spent": {}})["spent"])
                record = await self._asker.record(texts[place[0]], place[1], paid)
                if record["spent"]["calls"]:
                    await asyncio.to_thread(self._journal.write, unit, place, record)
                if not (record["reason"] and self._asker.ended):
                    records[place] = record

        await asyncio.gather(*(work() for _ in range(self._requests)))
        if self._asker.failure:
            raise UserError(f"{self._asker.failure}. What came back is kept: run the same command again to go on")
        if self._asker.ended:
            raise Stopped(f"stopped with {self._done + len(records) // self._samples:,} answers: {self._asker.ended}")
        self._commit(unit, rows, records, time.perf_counter() - started)

    def _commit(self, unit: int, rows: pa.Table, records: dict[Place, dict[str, Any]], seconds: float) -> None:
        """The unit's shard, in place of its answers' files. The samples of one text are votes."""
        replies = defaultdict[int, list[dict[str, Any]]](list)
        for (row, _), record in sorted(records.items()):
            replies[row].append(record)
        found = {row: answer_and_votes(self._fitted.compiled, some) for row, some in replies.items()}
        known = {row: pair for row, pair in sorted(found.items()) if pair}
        answers, votes = [answer for answer, _ in known.values()], [weights for _, weights in known.values()]
        captured = capture_votes(answers, votes, self._fitted.compiled.automaton)
        good = list(known)
        kept = rows.take(pa.array(good, pa.int64())).append_column("sample", pa.array([0] * len(good), pa.int32()))
        spent = sum((Usage(**record["spent"]) for record in records.values()), Usage())
        about = {"hashes": self._fitted.compiled.hashes, "teacher": self._identity, "seconds": seconds, "spent": vars(spent)}
        aside = [_aside(rows, row, replies[row][-1]["reason"]) for row in sorted(found) if row not in known]
        write_shard(self._fitted.shards, unit, kept, captured, about, aside)
        self._journal.delete(unit)
        self._done += len(good)


def _floats(usage: Usage) -> dict[str, float]:
    return {name: float(value) for name, value in vars(usage).items()}


def _aside(rows: pa.Table, index: int, reason: str) -> dict[str, Any]:
    row = rows.slice(index, 1).to_pylist()[0]
    return {"file": row["file"], "row": row["row"], "sample": 0, "id": row["id"], "reason": reason}
