"""An engine that answers at once, with answers and logits of a shard there is: all else of an extraction stays as it is."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pipeline.extract.extractor import UnitExtractor
from pipeline.shards.manifest import Shards
from pipeline.teacher import process
from pipeline.teacher.capture import TEMPERATURES, Captured
from pipeline.teacher.engines import Request

STORED = "RETORT_STORED_ANSWERS"  # the variable that names the file of the answers
SECONDS = "RETORT_STORED_SECONDS"  # the variable that says how long the engine takes for a unit; at once where it is not set


def store(shards: Shards, path: str) -> Captured:
    """Keeps what an engine captured at the choice steps of the first shard's answers, for the engine to give out."""
    table, automaton = next(shards.tables()), shards.compiled.automaton
    inside = np.arange(table.lengths.max()) < table.lengths[:, None]
    states = automaton.states_before(np.split(table.answers, np.cumsum(table.lengths)[:-1]))
    choice, kept = ~automaton.forced[states] & table.kept, np.zeros_like(inside)
    kept[inside] = choice
    tokens = np.zeros(inside.shape, np.int32)
    tokens[inside] = table.answers
    lse = np.zeros((*inside.shape, len(TEMPERATURES)), np.float32)
    lse[kept] = table.lse[choice[table.kept]]
    logits = np.zeros((*inside.shape, shards.compiled.watched.size), np.float32)
    logits[kept] = table.logprobs[choice[table.kept]] + lse[kept][:, :1]
    captured = Captured(tokens, table.lengths.astype(np.int32), kept, logits, lse)
    np.savez(path, **vars(captured))
    return captured


class StoredAnswers:
    """A `pipeline.teacher.engines.TeacherEngine` that knows some answers and gives them out in turn."""

    def __init__(self, path: str) -> None:
        self._path, found = path, np.load(path)
        self._captured = Captured(**{field.name: found[field.name] for field in fields(Captured)})

    def record(self, requests: list[Request]) -> Captured:
        """See `pipeline.teacher.engines.TeacherEngine`."""
        with open(f"{self._path}.log", "a", buffering=1) as log:  # one line for each unit, whoever writes it
            log.write(f"{len(requests)}\n")
        time.sleep(float(os.environ.get(SECONDS, "0")))
        turn = np.arange(len(requests)) % len(self._captured.lengths)
        return Captured(**{name: values[turn] for name, values in vars(self._captured).items()})

    def run(self) -> None:
        """See `pipeline.teacher.engines.TeacherEngine`: each thread does its own."""


class StandInExtractor(UnitExtractor):
    """The product's actor, whose engine's process is this module."""

    def __init__(self, *arguments: Any) -> None:
        start = process.subprocess.Popen
        own = {process.__name__: __name__}
        process.subprocess.Popen = lambda command, **how: start([own.get(part, part) for part in command], **how)  # type: ignore[misc, assignment]
        super().__init__(*arguments)


if __name__ == "__main__":
    process.open_teacher = lambda *_: StoredAnswers(os.environ[STORED])  # type: ignore[assignment]
    process.serve(Connection(int(sys.argv[1])))
