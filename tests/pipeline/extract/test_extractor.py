"""What an actor asks of its engine; tests/integration/test_run.py has it under Ray Data."""

from __future__ import annotations

from pathlib import Path
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
