"""Whatever dies in the middle of an extraction, every row of the input ends in exactly one place."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.shards.manifest import open_shards
from tests.conftest import RealCase
from tests.integration.chaos import KILL_DRIVER, KILL_ENGINE, KILL_NODE, VICTIMS, Chaos, assert_exactly_once, survive
from tests.tiny import save_teacher

TASK = """
name: tiny
teacher: none
instruction: Judge.
fields: {mood: [good, bad, mixed], loud: {type: boolean}}
comments: {min_tokens: 2, max_tokens: 60}
context: 110
auxiliary_tokens: 20
"""


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Arguments for 500 comments with doubled and missing ids, and malformed rows among them."""
    save_teacher(tmp_path / "teacher", seed=0)
    (tmp_path / "task.yaml").write_text(TASK)
    lines = [json.dumps({"id": i % 7 or None, "body": f"comment {i % 50} good and bad"}) for i in range(500)]
    lines[3], lines[100], lines[200] = "{broken", json.dumps({"body": 5}), json.dumps({"body": "x"})
    (tmp_path / "comments.jsonl").write_text("\n".join(lines) + "\n")
    named = {"task": "task.yaml", "teacher": "teacher", "comments": "comments.jsonl"}
    settings = ["teacher.engine=transformers", "teacher.actors=2", "extract.rows_per_unit=5", "extract.calibration_floor=0"]
    return [f"--{name}={tmp_path / value}" for name, value in named.items()] + [f"--set={setting}" for setting in settings]


@pytest.fixture
def tiny_chaos(tmp_path: Path, tiny: list[str]) -> Iterator[Chaos]:
    with Chaos(tmp_path, [*tiny, f"--out={tmp_path / 'out'}"], pause=0.5) as chaos:
        yield chaos


@pytest.mark.slow
def test_a_killed_engine_node_and_driver_lose_nothing(tiny_chaos: Chaos) -> None:
    survive(tiny_chaos, [KILL_ENGINE, KILL_NODE, KILL_DRIVER], random.Random(0))
    assert_exactly_once(tiny_chaos.out, 500)
    assert all(there and shards < 100 for _, there, shards in tiny_chaos.struck), tiny_chaos.struck


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_lose_nothing(tmp_path: Path, real_case: RealCase) -> None:
    rng, victims = random.Random(2026), list(VICTIMS) * 5
    rng.shuffle(victims)
    source = real_case.comments
    named = {"task": real_case.task, "teacher": real_case.teacher, "comments": source}
    settings = ["teacher.actors=2", "extract.rows_per_unit=64", "comments.limit=2560"]
    arguments = [f"--{name}={value}" for name, value in named.items()] + [f"--set={setting}" for setting in settings]
    for run in range(4):
        folder = tmp_path / str(run)
        folder.mkdir()
        with Chaos(folder, [*arguments, f"--out={folder / 'out'}"]) as chaos:
            survive(chaos, victims[run * 5 : run * 5 + 5], rng)
            assert sum(there for _, there, _ in chaos.struck) >= 4, chaos.struck
        with gzip.open(source, "rt") as lines:
            read = open_shards(str(folder / "out/shards")).manifest.comments.model_dump()["read"]
            assert sum(1 for _ in lines) >= read
        assert_exactly_once(chaos.out, read)
