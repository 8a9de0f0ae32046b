"""What a service's teacher answers, kept with its logits as shards for a later training."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pyarrow as pa

from pipeline.shards.files import committed_units, write_shard
from pipeline.shards.manifest import write_manifest
from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Value
from pipeline.teacher.capture import Captured
from student.predict.teacher import State, Teacher

log = logging.getLogger(__name__)

ROWS = 256  # answers of a whole shard
SECONDS = 10.0  # that an answer waits at most until it is written
SHARDS = "shards"  # in the service's folder
KINDS = {"file": pa.int32(), "row": pa.int64(), "sample": pa.int32(), "tokens": pa.list_(pa.int32())}


class KeptTeacher:
    """A teacher whose answers are kept. One thread may ask at a time, as with the teacher itself.

    The shard under way is written again as it grows, so what is there is always whole. The manifest has those that are full,
    and in the end all.

    Args:
        engine: which kind of teacher it is.
        compiled: what the answers are recorded as, see `student.predict.predict.taught_as`.
        folder: of the shards; those of an earlier service stay.

    Raises:
        UserError: the folder holds shards of another task.
    """

    def __init__(self, teacher: Teacher, engine: str, compiled: CompiledTask, folder: str) -> None:
        self._teacher, self._engine, self._compiled, self._folder = teacher, engine, compiled, folder
        self._lock = threading.Lock()  # between who asks and the timer
        self._unit = max(committed_units(folder), default=-1) + 1
        self._begin_unit()
        if self._unit:
            self._write_manifest()
        compiled.save(folder)

    @property
    def name(self) -> str:
        """See `Teacher`."""
        return self._teacher.name

    @property
    def state(self) -> State:
        """See `Teacher`."""
        return self._teacher.state

    def answer(self, texts: list[str]) -> list[dict[str, Value] | None]:
        """See `Teacher`."""
        started = time.perf_counter()
        recorded = self._teacher.record(texts)
        seconds = time.perf_counter() - started
        with self._lock:
            self._keep([texts[place] for place in recorded.places], recorded.captured, seconds)
        return recorded.by_text(len(texts), self._compiled)

    def close(self) -> None:
        """Ends the teacher, and writes what waits."""
        self._teacher.close()
        with self._lock:
            if self._rows:
                self._end_unit()
        if self._unit:
            log.info("the teacher's answers are in %s, for a later training", self._folder)

    def _begin_unit(self) -> None:
        self._rows, self._captured, self._seconds = list[dict[str, Any]](), list[Captured](), 0.0
        self._timer: threading.Timer | None = None

    def _keep(self, texts: list[str], captured: Captured, seconds: float) -> None:
        if not texts:
            return
        for text, tokens in zip(texts, self._compiled.tokenizer.encode(texts), strict=True):
            self._rows.append({"text": text, "tokens": tokens})
        self._captured.append(captured)
        self._seconds += seconds
        if len(self._rows) >= ROWS:
            self._end_unit()
        elif self._timer is None:
            self._timer = threading.Timer(SECONDS, self._write_in_time)
            self._timer.daemon = True
            self._timer.start()

    def _write_in_time(self) -> None:
        with self._lock:
            self._timer = None
            if self._rows:
                self._write_unit()

    def _end_unit(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._write_unit()
        self._unit += 1
        self._write_manifest()
        self._begin_unit()

    def _write_unit(self) -> None:
        columns = {name: [row[name] for row in self._rows] for name in ("text", "tokens")}
        count = len(self._rows)
        place = {"row": range(count), "file": [0] * count, "sample": [self._unit] * count, "id": [""] * count}
        rows = pa.table({name: pa.array(values, KINDS.get(name)) for name, values in (place | columns).items()})
        about = {"hashes": self._compiled.hashes, "seconds": self._seconds}
        write_shard(self._folder, self._unit, rows, Captured.join(self._captured), about)

    def _write_manifest(self) -> None:
        write_manifest(
            self._folder,
            self._unit,
            {
                "task_name": self._compiled.task.name,
                "hashes": self._compiled.hashes,
                "teacher": {"model": self.name, "engine": self._engine},
                "files": ["requests to a service"],
                "comments": {"source": {"answer": None}},
            },
        )
