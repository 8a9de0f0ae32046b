from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.comments.plan import (
    UNIT_COLUMNS,
    CommentSource,
    Plan,
    _set_aside,
    _UnitWriter,
    describe_source,
    dropped_too_many,
    find_comments,
    find_plan,
    make_plan,
    read_unit,
    unit_path,
)
from pipeline.comments.reading import KEPT, MALFORMED, SCHEMA
from pipeline.config import CommentsConfig
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer

STATUSES = [KEPT, MALFORMED, "special_tokens", "urls", "too_short", "too_long"]


def make_source(**changes: Any) -> CommentSource:
    content = {"task": "t", "tokenizer": "k", "files": [("/a.jsonl", "3f")], "text": "body", "id": "id", "answer": None}
    return CommentSource.model_validate(content | {"limit": None, "rows_per_unit": 4} | changes)


def make_task() -> Task:
    content = {"name": "t", "teacher": "none", "instruction": "J", "fields": {"a": [1]}, "comments": {"max_tokens": 5}}
    return Task.model_validate(content)


def make_table(statuses: list[str], first_row: int = 0) -> pa.Table:
    rows = [
        {
            "file": 0,
            "row": first_row + i,
            "id": f"id{first_row + i}",
            "text": f"text {first_row + i}",
            "tokens": [first_row + i, 7],
            "answer": [],
            "status": status,
            "reason": "why é" if status == MALFORMED else "",
        }
        for i, status in enumerate(statuses)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_units(folder: str, tables: list[list[str]], size: int, limit: int | None) -> tuple[_UnitWriter, list[bool]]:
    """Feeds tables of these statuses to a writer as `make_plan` does; tells what each `add` said."""
    writer, told, row = _UnitWriter(folder, size, limit), [], 0
    for statuses in tables:
        told.append(writer.add(make_table(statuses, row)))
        row += len(statuses)
        if not told[-1]:
            break
    writer.flush()
    return writer, told


@settings(max_examples=60)
@given(
    tables=st.lists(st.lists(st.sampled_from(STATUSES), max_size=9), max_size=5),
    size=st.integers(1, 5),
    limit=st.one_of(st.none(), st.integers(1, 12)),
)
def test_units_hold_the_kept_rows_in_order_up_to_the_limit(
    tmp_path_factory: pytest.TempPathFactory, tables: list[list[str]], size: int, limit: int | None
) -> None:
    folder = str(tmp_path_factory.mktemp("plan"))
    writer, told = write_units(folder, tables, size, limit)
    plan = writer.plan(make_source())
    statuses = [status for table in tables for status in table]
    rows = [row for row, status in enumerate(statuses) if status == KEPT]
    reached = limit is not None and len(rows) >= limit
    wanted = rows[:limit]
    read = statuses[: wanted[-1] + 1] if reached else statuses
    units = [read_unit(folder, unit) for unit in range(plan.units)]
    assert [row for unit in units for row in unit["row"].to_pylist()] == wanted
    assert [len(unit) for unit in units[:-1]] == [size] * (len(units) - 1)
    assert all(0 < len(unit) <= size for unit in units)
    assert (plan.read, plan.kept, plan.malformed) == (len(read), len(wanted), read.count(MALFORMED))
    assert plan.dropped == {status: read.count(status) for status in STATUSES[2:]}
    assert told == [True] * len(told) if not reached else told == [True] * (len(told) - 1) + [False]
    assert len(storage.list_files(folder)) == plan.units


def test_a_unit_keeps_every_column(tmp_path: Path) -> None:
    write_units(str(tmp_path), [[KEPT, "urls", KEPT]], size=8, limit=None)
    unit = read_unit(str(tmp_path), 0)
    assert unit.schema.names == UNIT_COLUMNS
    row = {"file": 0, "row": 2, "id": "id2", "text": "text 2", "tokens": [2, 7], "answer": []}
    assert unit.drop(["gold", "shares"]).to_pylist()[1] == row


def test_a_limit_ends_within_a_table_and_counts_no_further(tmp_path: Path) -> None:
    writer, told = write_units(str(tmp_path), [[KEPT, MALFORMED], ["urls", KEPT, KEPT, MALFORMED]], size=8, limit=2)
    plan = writer.plan(make_source())
    assert told == [True, False]
    assert (plan.read, plan.kept, plan.malformed, plan.dropped["urls"]) == (4, 2, 1, 1)


def test_no_rows_make_no_units(tmp_path: Path) -> None:
    writer, _ = write_units(str(tmp_path), [[], ["urls"]], size=2, limit=None)
    assert writer.plan(make_source()).units == 0
    assert storage.list_files(str(tmp_path)) == []


def test_the_summary_is_one_line(tmp_path: Path) -> None:
    writer, _ = write_units(str(tmp_path), [[KEPT] * 3 + ["urls", "too_long", "too_long", MALFORMED]], 2, None)
    assert writer.plan(make_source()).summary() == "7 rows read, 3 kept, 1 malformed, dropped: 1 urls, 2 too long"


def test_rows_set_aside_name_file_and_line() -> None:
    table = make_table([KEPT, MALFORMED, "urls"], first_row=10)
    malformed = {"file": "/a.jsonl", "line": 12, "id": "id11", "reason": "why é"}
    assert _set_aside(table, ["/a.jsonl"], every=False) == [malformed]
    assert _set_aside(table, ["/a.jsonl"], every=True) == [malformed, malformed | {"line": 13, "id": "id12", "reason": "urls"}]


def save_plan(folder: Path, source: CommentSource) -> None:
    plan = Plan(source=source, units=1, read=3, kept=2, malformed=1, dropped={"urls": 0})
    storage.write_json(str(folder / "plan.json"), plan.model_dump(mode="json"))


def test_a_plan_is_found_again(tmp_path: Path) -> None:
    assert find_plan(str(tmp_path), make_source()) is None
    save_plan(tmp_path, make_source())
    plan = find_plan(str(tmp_path), make_source())
    assert plan is not None
    assert (plan.source, plan.kept) == (make_source(), 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": "other"}, "its task differ"),
        ({"tokenizer": "other"}, "its tokenizer differ"),
        ({"files": [("/a.jsonl", "4e")]}, "its files differ"),
        ({"text": "other"}, "its text differ"),
        ({"limit": 1}, "its limit differ"),
        ({"rows_per_unit": 5, "id": "other"}, "its id, rows_per_unit differ"),
    ],
)
def test_a_plan_of_another_source_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    save_plan(tmp_path, make_source())
    with pytest.raises(UserError, match=named):
        find_plan(str(tmp_path), make_source(**changes))


def test_units_without_a_plan_are_no_plan(tmp_path: Path) -> None:
    write_units(str(tmp_path), [[KEPT] * 3], 2, None)
    assert find_plan(str(tmp_path), make_source()) is None


def test_comments_are_found_once_sorted_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.csv", "c.parquet"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    config = CommentsConfig(paths=["c.parquet", "*.jsonl", ".", f"{tmp_path}/a.csv"])
    assert find_comments(config) == [str(tmp_path / name) for name in ("c.parquet", "b.jsonl", "a.csv")]


@pytest.mark.parametrize(
    ("paths", "named"), [([], "no comments given"), (["absent"], "no file at absent"), (["x.txt"], "are read from")]
)
def test_comments_that_cannot_be_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], named: str
) -> None:
    (tmp_path / "x.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        find_comments(CommentsConfig(paths=paths))


def test_the_source_tells_what_was_read(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.jsonl") for i in range(9)]
    for path in paths:
        storage.write_text(path, path)
    task = make_task()
    source = describe_source(CommentsConfig(limit=9), paths, task, tokenizer, 4)
    assert source.files == [(path, storage.fingerprint(path)) for path in paths]
    assert (source.task, source.tokenizer, source.limit, source.rows_per_unit) == (task.hash, tokenizer.hash, 9, 4)


def test_a_unit_has_its_own_file() -> None:
    assert unit_path("s3://b/c", 7) == "s3://b/c/unit-000007.parquet"


def plan_of(folder: Path, tables: Iterator[pa.Table], **config: Any) -> Plan:
    """Makes a plan of these tables, as though they were what the files gave."""
    return make_plan(str(folder), make_source(), CommentsConfig(**config), tables)


def test_malformed_rows_are_set_aside_as_lines(tmp_path: Path) -> None:
    tables = iter([make_table([KEPT, MALFORMED]), make_table([MALFORMED, "urls", MALFORMED], 2)])
    plan = plan_of(tmp_path, tables, max_malformed=3)
    lines = (tmp_path / "set_aside.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": "/a.jsonl", "line": line, "id": f"id{line - 1}", "reason": "why é"} for line in (2, 3, 5)
    ]
    assert "é" in lines[0]
    assert plan.malformed == 3
    assert storage.list_files(str(tmp_path)) == ["plan.json", "set_aside.jsonl", "unit-000000.parquet"]


def test_too_many_malformed_rows_leave_no_plan(tmp_path: Path) -> None:
    tables = iter([make_table([KEPT, MALFORMED, MALFORMED]), make_table([KEPT, MALFORMED, KEPT], 3)])
    with pytest.raises(UserError, match=r"more than 2 malformed rows .*; the last: .*'line': 5, 'id': 'id4'"):
        plan_of(tmp_path, tables, max_malformed=2)
    assert storage.list_files(str(tmp_path)) == []


def test_a_file_without_malformed_rows_sets_nothing_aside(tmp_path: Path) -> None:
    plan_of(tmp_path, iter([make_table([KEPT])]), max_malformed=0)
    assert (tmp_path / "set_aside.jsonl").read_bytes() == b""


def test_malformed_rows_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    table = make_table([KEPT] + [MALFORMED] * 500)
    tracemalloc.start()
    plan_of(tmp_path, itertools.repeat(table, 60))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "set_aside.jsonl").read_text().count("\n") == 30_000
    assert peak < 2 << 20


def test_kept_rows_do_not_become_python_objects(tmp_path: Path) -> None:
    table = make_table([KEPT] * 20_000)
    tracemalloc.start()
    plan = make_plan(str(tmp_path), make_source(rows_per_unit=20_000), CommentsConfig(), [table])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (plan.read, plan.kept) == (20_000, 20_000)
    assert peak < 1 << 20


def test_an_input_edited_to_the_same_size_is_another(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = str(tmp_path / "x.jsonl")

    def source() -> CommentSource:
        return describe_source(CommentsConfig(), [path], make_task(), tokenizer, 4)

    storage.write_text(path, '{"body": "a"}\n')
    save_plan(tmp_path, source())
    assert find_plan(str(tmp_path), source()) is not None
    storage.write_text(path, '{"body": "b"}\n')
    with pytest.raises(UserError, match="its files differ"):
        find_plan(str(tmp_path), source())


def test_a_plan_of_another_version_is_named(tmp_path: Path) -> None:
    save_plan(tmp_path, make_source())
    content = storage.read_json(str(tmp_path / "plan.json"))
    content["source"]["files"] = [["/a.jsonl", 3]]
    storage.write_json(str(tmp_path / "plan.json"), content)
    with pytest.raises(UserError, match=r"plan\.json is no plan of this version"):
        find_plan(str(tmp_path), make_source())


def test_a_rule_that_drops_many_comments_is_told_with_what_would_keep_them(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    words = [*["a"] * 90, *["a b c d e f"] * 8, *["long " * 50] * 2]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in words))
    source = make_source(files=[(str(path), "f")])
    dropped = {"special_tokens": 0, "urls": 5, "too_short": 6, "too_long": 10}
    plan = Plan(source=source, units=1, read=100, kept=79, malformed=0, dropped=dropped)
    lines = dropped_too_many(plan, make_task(), tokenizer)
    assert [line.split(" comments ")[0] for line in lines[:2]] == ["6 of 100", "10 of 100"]
    assert "comments.min_tokens (1)" in lines[0]
    assert "comments.max_tokens (5)" in lines[1]
    (keeps,) = map(len, tokenizer.encode([words[-1].strip()]))
    assert lines[2] == f"max_tokens: {keeps} would keep 99 in 100 of the first 100 comments"
    assert dropped_too_many(plan.model_copy(update={"read": 1000}), make_task(), tokenizer) == []
