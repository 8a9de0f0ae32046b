"""People's labels beside the comments: read like answers, and never a reason to set a row aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.base.errors import UserError
from pipeline.comments.reading import KEPT, Columns, comment_tables
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer

TASK = Task(name="t", instruction="Judge.", fields={"mood": ["good", "bad"], "loud": [True, False]})
ROWS = [
    {"body": "one", "mood": "good", "loud": True},
    {"body": "two", "mood": "so-so", "loud": True},
    {"body": "three", "mood": None, "loud": None},
]


def test_a_label_that_does_not_fit_is_none(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (table,) = comment_tables([str(path)], Columns("body", "id", gold="mood,loud"), TASK, tokenizer)
    assert table["status"].to_pylist() == [KEPT] * 3
    labels = [TASK.parse(tokenizer.decode(ids)) if ids else None for ids in table["gold"].to_pylist()]
    assert labels == [("good", True), None, None]
    assert table["answer"].to_pylist() == [[], [], []]


def test_columns_of_labels_are_the_fields(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match=r"comments\.gold names the columns mood, size"):
        Columns("body", "id", gold="mood,size").require_fields(TASK)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "one"}\n')
    (table,) = comment_tables([str(path)], Columns("body", "id", gold="mood"), TASK, tokenizer)
    assert "Set comments.gold" in table["reason"].to_pylist()[0]
