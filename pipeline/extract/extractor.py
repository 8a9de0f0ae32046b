"""The Ray Data actor that turns units of comments into logit shards, one engine each."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock, Semaphore
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from pipeline.base.errors import UserError
from pipeline.base.version import check_code_version
from pipeline.comments.plan import read_unit
from pipeline.config import TeacherConfig
from pipeline.extract.monitor import UnitReport
from pipeline.shards.files import shard_exists, write_shard
from pipeline.shards.manifest import read_footer
from pipeline.shards.payload import Compact
from pipeline.task.compiled import CompiledTask
from pipeline.task.tokenization import Prompt
from pipeline.teacher.capture import Captured, nothing
from pipeline.teacher.engines import Capture, Job, Request
from pipeline.teacher.isolation import isolate
from pipeline.teacher.process import EngineError, EngineProcess

AT_A_TIME = 2  # units of one engine
SKIPPED = -1  # in place of a unit's rows: the run is stopping


@dataclass(frozen=True)
class Extraction:
    """Where one extraction reads and writes, and whom it asks. It travels to the actors; they read the rest from `shards`."""

    model: str
    identity: dict[str, Any]
    teacher: TeacherConfig
    capture: Capture
    samples: int
    prompt: Prompt
    max_prompt: int
    comments: str
    shards: str

    def job(self, compiled: CompiledTask) -> Job:
        """What its engines are to do."""
        return Job(
            automaton=compiled.automaton,
            end_id=compiled.tokenizer.end_id,
            max_prompt=self.max_prompt,
            watched=compiled.watched.tokens,
            capture=self.capture,
            temperature=self.teacher.temperature,
        )


class UnitExtractor:
    """Extracts units, `AT_A_TIME` of them in threads of Ray's, so that the engine has one's texts while the other is written.

    Its engine lives in a process of its own and is started for the first unit.
    """

    def __init__(self, extraction: Extraction, monitor: Any) -> None:
        check_code_version()
        self._extraction, self._monitor = extraction, monitor
        self._compiled = CompiledTask.load(extraction.shards)
        self._compact = Compact.load(extraction.shards, self._compiled.automaton)
        self._engine: EngineProcess | None = None
        self._starting, self._alone, self._room = Lock(), Lock(), Semaphore(AT_A_TIME)
        self._units: set[int] = set()  # under way
        self._name = f"{ray.get_runtime_context().get_node_id()[:6]}/{os.getpid()}"

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, list[int]]:
        """Extracts the batch's units; returns the rows of each, or `SKIPPED`."""
        units = batch["unit"].tolist()
        return {"unit": units, "rows": [self._unit(unit) for unit in units]}

    def _unit(self, unit: int) -> int:
        if shard_exists(self._extraction.shards, unit):  # its result was lost with a node, or another run was quicker
            return read_footer(self._extraction.shards, unit).rows
        self._units.add(unit)
        try:
            if self._report():
                return SKIPPED
            rows, aside = self._extract(unit)
        except UserError as error:  # Ray Data wraps it past recognition
            self._report("failed", failure=str(error))
            raise
        finally:
            self._units.remove(unit)
        self._report(committed=True, rows=rows, set_aside=aside)
        return rows

    def _report(self, state: str = "", **about: Any) -> bool:
        """Tells the driver what this actor does; true where it shall do no more."""
        state = state or ", ".join(f"unit {unit}" for unit in sorted(self._units)) or "idle"
        try:
            return ray.get(self._monitor.report.remote(UnitReport(self._name, state, **about)))
        except ray.exceptions.RayError:  # the driver's side is gone: what is begun is still worth finishing
            return False

    def _extract(self, unit: int) -> tuple[int, int]:
        """Commits one unit; returns its examples and the rows set aside."""
        rows, requests, aside = self._requests(read_unit(self._extraction.comments, unit))
        start = time.perf_counter()
        found = isolate(self._asker(), requests)
        seconds = time.perf_counter() - start
        order = [index for indices, _ in found.parts for index in indices]
        captured = Captured.join([part for _, part in found.parts] or [nothing(self._compiled.watched.size)])
        finite = captured.finite()
        reasons = dict(found.poison)
        reasons |= {i: "the teacher's logits are not finite" for i, good in zip(order, finite, strict=True) if not good}
        aside += [_record(rows, i, reason) for i, reason in sorted(reasons.items())]
        kept = rows.take(pa.array(np.array(order, np.int64)[finite]))
        about = {"hashes": self._compiled.hashes, "teacher": self._extraction.identity, "seconds": seconds}
        self._commit(unit, kept, captured.select(finite), about, aside)
        return len(kept), len(aside)

    def _requests(self, comments: pa.Table) -> tuple[pa.Table, list[Request], list[dict[str, Any]]]:
        """A unit's rows, one for each answer, with what is asked of the engine; and the rows that cannot be asked."""
        samples, count = self._extraction.samples, len(comments)
        prompts = [self._prompt(text) for text in comments["text"].to_pylist()]
        rows = comments.take(pa.array(np.repeat(np.arange(count), samples)))
        rows = rows.append_column("sample", pa.array(np.tile(np.arange(samples), count), pa.int32()))
        requests, aside, good = [], [], []
        for i, row in enumerate(rows.to_pylist()):
            prompt = prompts[i // samples]
            if isinstance(prompt, str):
                aside.append(_record(rows, i, prompt))
            else:
                good.append(i)
                requests.append(Request(prompt, row["answer"] or None, _seed(row)))
        return rows.take(pa.array(good, pa.int64())), requests, aside

    def _prompt(self, text: str) -> list[int] | str:
        """A comment's prompt, or why it has none."""
        try:
            ids = self._extraction.prompt.ids([text], self._compiled.tokenizer)[0]
        except ValueError as error:
            return str(error)
        if len(ids) > self._extraction.max_prompt:
            return f"the prompt takes {len(ids)} tokens, at most {self._extraction.max_prompt} were expected"
        return ids

    def _asker(self) -> Callable[[list[Request]], Captured]:
        """What asks the engine, the first time beside another unit, then alone: an engine dies of one row for all of them."""
        tries = itertools.count()

        def ask(requests: list[Request]) -> Captured:
            if next(tries) == 0:
                with self._room:
                    return self._record(requests)
            with self._alone, ExitStack() as rooms:
                for _ in range(AT_A_TIME):
                    rooms.enter_context(self._room)
                return self._record(requests)

        return ask

    def _record(self, requests: list[Request]) -> Captured:
        """Asks the engine, which is started where there is none."""
        with self._starting:
            if self._engine is None:
                self._report("starting the engine")
                job = self._extraction.job(self._compiled)
                self._engine = EngineProcess(self._extraction.model, self._extraction.teacher, job)
            engine = self._engine
        try:
            return engine.record(requests)
        except EngineError:
            with self._starting:
                self._engine = None if self._engine is engine else self._engine
            raise

    def _commit(
        self, unit: int, rows: pa.Table, captured: Captured, about: dict[str, Any], aside: list[dict[str, Any]]
    ) -> None:
        try:
            write_shard(self._extraction.shards, unit, rows, captured, about, aside, self._compact)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room" if full else "mend that"
            raise UserError(
                f"cannot write to {self._extraction.shards}: {error}. What is there is whole: {advice} and run the same "
                "command again to go on"
            ) from error


def _record(rows: pa.Table, index: int, reason: str) -> dict[str, Any]:
    row = rows.slice(index, 1).to_pylist()[0]
    return {name: row[name] for name in ("file", "row", "sample", "id")} | {"reason": reason}


def _seed(row: dict[str, Any]) -> int:
    """Of one answer's sampling: the same whenever the row is asked again."""
    key = f"{row['file']} {row['row']} {row['sample']}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:7], "big")
