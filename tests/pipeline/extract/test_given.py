"""Answers that were given already, to shards; tests/integration/test_run.py has the whole command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.config import PipelineSettings
from pipeline.extract.given import import_answers
from pipeline.shards.manifest import Manifest, Shards, open_shards
from pipeline.task.task import Task
from pipeline.task.task_file import dump_task

TASK = Task(name="mail", instruction="Sort it.", fields={"team": ["billing", "sales"], "urgent": [True, False]})
ROWS: list[dict[str, Any]] = [
    {"body": "Where is my invoice?", "team": "billing", "urgent": False},
    {"body": "I want to buy it", "team": "sales", "urgent": False},
    {"body": "where is  my INVOICE?", "team": "billing", "urgent": True},
    {"body": "Where is my invoice?", "team": "billing", "urgent": True},
    {"body": "Where is my invoice?", "team": "sales", "urgent": True},
    {"body": "Call me", "team": "marketing", "urgent": True},
]


class Import:
    """An import of some rows to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "task.yaml").write_text(dump_task(TASK))

    def __call__(self, rows: list[dict[str, Any]] = ROWS, answer: str = "team,urgent", **extract: Any) -> Manifest:
        (self.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "task": str(self.folder / "task.yaml"),
            "out": str(self.folder / "out"),
            "comments": {"paths": [str(self.folder / "log.jsonl")], "answer": answer},
            "extract": extract,
        }
        return import_answers(PipelineSettings.model_validate(settings))

    @property
    def shards(self) -> Shards:
        return open_shards(str(self.folder / "out/shards"))


@pytest.fixture
def importing(tmp_path: Path) -> Import:
    return Import(tmp_path)


def test_rows_of_one_text_are_votes_wherever_they_stand(importing: Import) -> None:
    manifest = importing(rows_per_unit=2)
    assert (manifest.rows, manifest.units, manifest.answers) == (2, 3, "given")
    compiled = importing.shards.compiled
    table = next(importing.shards.tables())
    assert (table.texts, table.keys[:, 1].tolist()) == ([ROWS[0]["body"], ROWS[1]["body"]], [0, 1])
    first = [row for row, mine in zip(table.logprobs.astype(np.float64), np.repeat([0, 1], 2), strict=True) if mine == 0]
    columns = [compiled.automaton.column[compiled.tokenizer.encode([f": {value}"])[0][0]] for value in ('"billing"', '"sales"')]
    assert np.allclose(np.exp(first[0][columns]), [3 / 4, 1 / 4], atol=1e-3)
    columns = [compiled.automaton.column[compiled.tokenizer.encode([f": {value}"])[0][0]] for value in ("true", "false")]
    assert np.allclose(np.exp(first[1][columns]), [2 / 3, 1 / 3], atol=1e-3)
    answers = np.split(table.answers, np.cumsum(table.lengths)[:-1])
    assert [TASK.parse(compiled.tokenizer.decode(answer)) for answer in answers] == [("billing", True), ("sales", False)]


def test_an_answer_that_does_not_fit_is_set_aside(importing: Import) -> None:
    importing()
    lines = (importing.folder / "out/comments/set_aside.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [6]
    assert "team is 'marketing'" in lines[0]


def test_a_second_run_writes_what_is_missing_alone(importing: Import) -> None:
    digest = importing(rows_per_unit=2).digest
    shard, other = (importing.folder / f"out/shards/shard-{unit:06d}.parquet" for unit in (0, 2))
    before = shard.stat().st_mtime_ns
    other.unlink()
    assert importing(rows_per_unit=2).digest == digest
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another run"):
        importing([*ROWS, ROWS[0]], rows_per_unit=2)


def test_json_text_is_an_answer_too(importing: Import) -> None:
    row = {"body": "Hello", "reply": '{"urgent": true, "team": "sales"}'}
    assert importing([row], answer="reply").rows == 1
    with pytest.raises(UserError, match="the task's fields are team, urgent"):
        importing([row], answer="reply,team")


def test_probabilities_beside_an_answer_become_those_of_its_values(importing: Import) -> None:
    shares = {"team": {"billing": 0.7, "sales": 0.3}, "urgent": {"false": 0.9}}
    rows = [
        {"body": "Hello", "team": "billing", "urgent": False, "p": shares},
        {"body": "Again", "team": "sales", "urgent": True, "p": {"team": {"other": 1}}},
    ]
    (importing.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comments = {"paths": [str(importing.folder / "log.jsonl")], "answer": "team,urgent", "probabilities": "p"}
    settings = {"task": str(importing.folder / "task.yaml"), "out": str(importing.folder / "out"), "comments": comments}
    assert import_answers(PipelineSettings.model_validate(settings)).rows == 1
    table = next(importing.shards.tables())
    found = np.sort(np.exp(table.logprobs.astype(np.float64)), axis=1)[:, -2:]
    assert np.allclose(found, [[0.3, 0.7], [0.1, 0.9]], atol=1e-3)
    aside = (importing.folder / "out/comments/set_aside.jsonl").read_text()
    assert "the probabilities do not fit the task: it is not an object with team and urgent" in aside
