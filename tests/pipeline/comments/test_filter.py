from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from pipeline.base.errors import UserError
from pipeline.comments.reading import (
    KEPT,
    MALFORMED,
    SCHEMA,
    Columns,
    Comment,
    _table,
    filter_rows,
    read_file,
    tokenize_answers,
)
from pipeline.task.task import CommentRules, Task
from pipeline.task.tokenization import TeacherTokenizer, TextTokenizer
from tests.pipeline.comments.comment_files import rows_of
from tests.tiny import tiny_tokenizer


def filtered(tokenizer: TextTokenizer, texts: list[str], **rules: Any) -> list[Comment]:
    rows = [Comment(i, str(i), text) for i, text in enumerate(texts)]
    return filter_rows(rows, CommentRules.model_validate({"min_tokens": 1, "max_tokens": 25} | rules), tokenizer)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("I love it", KEPT),
        ("", "too_short"),
        ("positive " * 40, "too_long"),
        ("see https://x.org", "urls"),
        ("see HTTP://x.org", "urls"),
        ("see www.x.org", "urls"),
        ("awww.x", KEPT),
        ("x <eos> y", "special_tokens"),
        ("<end_of_turn> https://x.org " + "positive " * 30, "special_tokens"),
        ("https://x.org " + "positive " * 30, "urls"),
        ("<end_of_turn> https://x.org " + "positive " * 500, "too_long"),
    ],
)
def test_rules_apply_in_order(tokenizer: TextTokenizer, text: str, status: str) -> None:
    (row,) = filtered(tokenizer, [text])
    assert row.status == status
    if status == KEPT:
        assert row.tokens == tokenizer.encode([text])[0]
    else:
        assert (row.text, row.tokens) == ("", [])
    assert row.id == "0"


def test_lengths_count_tokens_and_both_ends_are_kept(tokenizer: TextTokenizer) -> None:
    texts = ["Ж" * n for n in range(1, 6)]  # two byte tokens each
    statuses = [row.status for row in filtered(tokenizer, texts, min_tokens=4, max_tokens=8)]
    assert statuses == ["too_short", KEPT, KEPT, KEPT, "too_long"]


def test_rules_can_keep_urls_and_the_text_of_special_tokens(tokenizer: TextTokenizer) -> None:
    rows = filtered(tokenizer, ["www.x.org", "a <eos> b"], urls=True, special_tokens=True, max_tokens=60)
    assert [row.status for row in rows] == [KEPT, KEPT]
    assert not any(tokenizer.has_control(row.tokens) for row in rows)


def test_malformed_rows_pass_the_filter_as_they_are(tokenizer: TextTokenizer) -> None:
    row = Comment(3, "x", status=MALFORMED, reason="not UTF-8")
    assert filter_rows([row], CommentRules(max_tokens=5), tokenizer) == [row]
    assert filter_rows([], CommentRules(max_tokens=5), tokenizer) == []


def test_large_comments_are_fast(bpe_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    texts = ["x" * 100_000, "<" * 100_000, "ha " * 33_000, "é日" * 50_000, "\x00" * 100_000, "www" * 33_000]
    content = b"".join(json.dumps({"body": text}).encode() + b"\n" for text in texts)
    started = time.perf_counter()
    rows = rows_of(tmp_path, "x.jsonl", content)
    marked = filter_rows(rows, CommentRules(max_tokens=25), bpe_tokenizer)
    assert time.perf_counter() - started < 6
    assert {row.status for row in marked} == {"too_long"}


def test_rows_as_a_table(tokenizer: TextTokenizer) -> None:
    rows = [*filtered(tokenizer, ["I love it", ""]), Comment(2, status=MALFORMED, reason="why")]
    table = _table(5, rows)
    assert table.schema == SCHEMA
    assert table["file"].to_pylist() == [5, 5, 5]
    assert table["tokens"].to_pylist()[0] == tokenizer.encode(["I love it"])[0]
    assert table["status"].to_pylist() == [KEPT, "too_short", MALFORMED]


def write_table(folder: Path, ending: str, table: pa.Table) -> str:
    path = folder / f"x{ending}"
    if ending == ".parquet":
        pq.write_table(table, path)
    elif ending == ".csv":
        pa_csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_given_answers_become_tokens_and_what_does_not_fit_is_set_aside(tmp_path: Path, ending: str) -> None:
    task = Task.model_validate(
        {"name": "t", "teacher": "t", "instruction": "J", "fields": {"a": ["x", "y"]}, "comments": {"max_tokens": 40}}
    )
    given = ['{"a": "x"}', "y", '{"a": "z"}', ""]
    table = pa.table({"body": ["a comment"] * 4, "label": given})
    tokenizer = TeacherTokenizer(tiny_tokenizer())
    rows = list(read_file(write_table(tmp_path, ending, table), Columns("body", "id", "label")))
    marked = tokenize_answers(filter_rows(rows, task.comments, tokenizer), task, tokenizer)
    ids = [[*tokenizer.encode([text])[0], tokenizer.end_id] for text in ('{"a": "x"}', '{"a": "y"}')]
    assert [row.answer for row in marked] == [*ids, [], []]
    assert [(row.status, row.reason) for row in marked[2:]] == [
        (MALFORMED, "the answer does not fit the task: a is 'z', which is none of its 2 values"),
        (MALFORMED, "no answer is given"),
    ]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_given_answers_may_have_a_column_for_each_field(tmp_path: Path, ending: str) -> None:
    content = {"name": "t", "teacher": "t", "instruction": "J", "comments": {"max_tokens": 40}}
    task = Task.model_validate(content | {"fields": {"intent": ["yes", "no"], "urgent": [True, False]}})
    table = pa.table({"body": ["a comment"] * 2, "urgent": [True, False], "intent": ["yes", "maybe"]})
    columns = Columns("body", "id", "intent, urgent")
    columns.require_fields(task)
    tokenizer = TeacherTokenizer(tiny_tokenizer())
    rows = tokenize_answers(list(read_file(write_table(tmp_path, ending, table), columns)), task, tokenizer)
    assert rows[0].answer == [*tokenizer.encode(['{"intent": "yes", "urgent": true}'])[0], tokenizer.end_id]
    assert rows[1].reason == "the answer does not fit the task: intent is 'maybe', which is none of its 2 values"


def test_one_columns_answers_to_a_task_of_several_fields_are_set_aside_with_what_would_do(tmp_path: Path) -> None:
    content = {"name": "t", "teacher": "t", "instruction": "J", "comments": {"max_tokens": 40}}
    task = Task.model_validate(content | {"fields": {"domain": ["travel"], "intent": ["translate"]}})
    (row,) = tokenize_answers([Comment(0, text="x", given="translate")], task, TeacherTokenizer(tiny_tokenizer()))
    what = "'translate' is not an object with domain and intent; for a column each: --answers domain,intent"
    assert row.reason == f"the answer does not fit the task: {what}"
    with pytest.raises(UserError, match="names the columns intent, topic, but the task's fields are domain, intent: name one"):
        Columns("body", "id", "intent,topic").require_fields(task)
