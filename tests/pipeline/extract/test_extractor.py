"""What an actor asks of its engine; tests/integration/test_run.py has it under Ray Data."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from pipeline.config import TeacherConfig
from pipeline.extract.extractor import Extraction, UnitExtractor
from pipeline.task.compilation import compile_automaton
from pipeline.task.compiled import CompiledTask
from pipeline.task.tokenization import TeacherTokenizer
from pipeline.task.vocabulary import WatchedSet
from pipeline.teacher.capture import Captured
from pipeline.teacher.engines import Request
from pipeline.teacher.isolation import isolate
from pipeline.teacher.process import EngineError
from tests.tiny import tiny_task, tiny_tokenizer


@pytest.fixture
def extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UnitExtractor:
    """Of three samples a comment."""
    task, tokenizer = tiny_task(), TeacherTokenizer(tiny_tokenizer())
    automaton = compile_automaton(task, tokenizer)
    watched = WatchedSet(automaton.tokens, len(automaton.tokens))
    CompiledTask(task, tokenizer, automaton, watched).save(str(tmp_path))
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    teacher, prompt = TeacherConfig(temperature=1.0), tokenizer.prompt(task)
    longest = prompt.longest(task, tokenizer)
    extraction = Extraction("model", {}, teacher, "all", 3, prompt, longest, str(tmp_path / "comments"), str(tmp_path))
    return UnitExtractor(extraction, None)


class Engine:
    """Dies of prompts that begin with 9, and of whatever it is asked beside them; says how many it was asked at a time."""

    def __init__(self, *_: Any) -> None:
        self._lock, self._under_way, self._dead = Lock(), 0, False
        engines.append(self)
        self.most = 0

    def record(self, requests: list[Request]) -> Captured:
        with self._lock:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            self._dead |= any(request.prompt[0] == 9 for request in requests)
        time.sleep(0.02)
        with self._lock:
            self._under_way -= 1
            if self._dead:
                raise EngineError("dead")
        lengths = np.array([request.prompt[1] for request in requests], np.int32)
        n = len(requests)
        return Captured(lengths[:, None], lengths, np.ones((n, 1), np.bool_), np.zeros((n, 1, 1)), np.zeros((n, 1, 3)))


engines: list[Engine] = []


def test_two_units_are_asked_together_and_one_of_them_that_kills_the_engine_harms_no_row_of_the_other(
    extractor: UnitExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.extract.extractor.EngineProcess", Engine)
    monkeypatch.setattr(extractor, "_report", lambda *_, **__: False)
    units = [[Request([5, i]) for i in range(40)], [Request([9 if i in (7, 30) else 5, i]) for i in range(40)]] * 2
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda requests: isolate(extractor._asker(), requests), units))
    for one, poison in zip(found, ([], [7, 30]) * 2, strict=True):
        assert sorted(one.poison) == poison
        answered = [(i, length) for rows, captured in one.parts for i, length in zip(rows, captured.lengths, strict=True)]
        assert answered == [(i, i) for i in range(40) if i not in poison]
    assert max(engine.most for engine in engines) == 2
    assert len(engines) < 60


def comments(rows: list[int]) -> pa.Table:
    content: list[dict[str, Any]] = [
        {"file": row % 2, "row": row, "id": str(row), "text": "good", "tokens": [5], "answer": None} for row in rows
    ]
    return pa.Table.from_pylist(content)


def test_each_sample_of_a_comment_is_drawn_with_a_seed_of_its_own_and_the_same_one_again(extractor: UnitExtractor) -> None:
    rows, requests, aside = extractor._requests(comments([0, 1, 2, 3]))
    assert not aside
    assert rows["sample"].to_pylist() == [0, 1, 2] * 4
    assert rows["row"].to_pylist() == np.repeat([0, 1, 2, 3], 3).tolist()
    seeds = [request.seed for request in requests]
    assert None not in seeds
    assert len(set(seeds)) == len(rows)
    _, again, _ = extractor._requests(comments([3, 2]))  # in another unit
    assert [request.seed for request in again] == seeds[9:] + seeds[6:9]
