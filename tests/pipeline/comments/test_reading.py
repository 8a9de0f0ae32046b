from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.base.runtime import start_ray
from pipeline.comments.reading import BATCH_ROWS, KEPT, MALFORMED, Columns, Comment, comment_batches, file_format, read_file
from pipeline.task.tokenization import TextTokenizer
from tests.conftest import RealCase
from tests.pipeline.comments.comment_files import (
    COLUMNS,
    GOOD,
    as_csv,
    compress,
    jsonl,
    parquet,
    reasons,
    rows_of,
    table_bytes,
    write,
)
from tests.tiny import tiny_task


def strings(values: list[bytes]) -> pa.Array:
    """A string column of any bytes, valid UTF-8 or not."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("ending", "encode"), [(".jsonl", jsonl), (".ndjson", jsonl), (".json", jsonl), (".csv", as_csv), (".parquet", parquet)]
)
def test_every_format_and_compression_gives_the_same_rows(
    tmp_path: Path, ending: str, compression: str, encode: Callable[[list[tuple[str, str]]], bytes]
) -> None:
    rows = rows_of(tmp_path, f"x{ending}{compression}", compress(encode(GOOD), compression))
    assert rows == [Comment(i, id_, body) for i, (id_, body) in enumerate(GOOD)]


@pytest.mark.parametrize("name", ["x.txt", "x", "x.jsonl.bz2", "x.gz", "x.jsonl.gz.zst"])
def test_other_files_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="comments are read from"):
        file_format(name)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"body": "x"', "not JSON: "),
        (b"plain text", "not JSON: "),
        (b"[" * 200_000, "not JSON: "),
        (b'{"body": "x", "n": ' + b"1" * 5000 + b"}", "not JSON: "),
        (b'{"body": "x"} {"body": "y"}', "not JSON: "),
        (b'{"body": "raw \x00 and \x1f"}', "not JSON: "),
        (b'["x"]', "a JSON object was expected, not list"),
        (b'"x"', "a JSON object was expected, not str"),
        (b"null", "a JSON object was expected, not NoneType"),
        (b"1", "a JSON object was expected, not int"),
        (b"{}", "no key 'body'"),
        (b'{"text": "x"}', "no key 'body'"),
        (b'{"body": null}', "the text is null"),
        (b'{"body": 1}', "the text is int"),
        (b'{"body": true}', "the text is bool"),
        (b'{"body": ["x"]}', "the text is list"),
        (b'{"body": "\xff\xfe"}', "not UTF-8"),
        (b'{"body": "\xc3"}', "not UTF-8"),
        (b'{"body": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"body": "\\ud83d alone"}', "not UTF-8"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_malformed_lines_are_set_aside_with_their_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    rows = rows_of(tmp_path, "x.jsonl", b'{"body": "before"}\n' + line + b'\n{"body": "after"}\n')
    assert [row.text for row in rows if row.status == KEPT] == ["before", "after"]
    ((number, found),) = reasons(rows)
    assert number == 1
    assert found.startswith(reason)
    assert len(found) <= 500


@pytest.mark.parametrize(
    ("line", "id_", "text"),
    [
        (b'{"body": "\\u0000 \\u001b[31m \\u0007", "id": 7}', "7", "\x00 \x1b[31m \x07"),
        (b'{"body": "  x \\n", "id": null}', "", "x"),
        (b'{"body": "\\ud83d\\ude00"}', "", "😀"),
        (b'{"body": "x", "id": "\\ud83d"}', "?", "x"),
        (b'{"body": "x", "id": ["y"]}', "['y']", "x"),
        (b'\xef\xbb\xbf{"body": "x"}', "", "x"),
        (b'{"body": "a", "body": "x"}', "", "x"),
        (b'{"body": "x"}\r', "", "x"),
        (b'{"body": ""}', "", ""),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_odd_lines_are_kept(tmp_path: Path, line: bytes, id_: str, text: str) -> None:
    assert rows_of(tmp_path, "x.jsonl", line + b"\n") == [Comment(0, id_, text)]


def test_no_depth_of_nesting_raises(tmp_path: Path) -> None:
    lines = [b'{"body": "x", "id": ' + b"[" * depth + b"]" * depth + b"}\n" for depth in range(700, 1010)]
    assert len(rows_of(tmp_path, "x.jsonl", b"".join(lines))) == len(lines)


def test_blank_lines_are_numbered_but_not_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "x.jsonl", b'\n{"body": "x"}\n \t\n\r\n{"body": "y"}')
    assert [(row.row, row.text) for row in rows] == [(1, "x"), (4, "y")]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_an_empty_file_has_no_good_rows(tmp_path: Path, ending: str, compression: str) -> None:
    path = write(tmp_path, f"x{ending}{compression}", compress(b"", compression))
    if ending == ".csv":
        with pytest.raises(UserError, match="no column 'body'; it has none"):
            list(read_file(path, COLUMNS))
    else:
        assert all(row.status == MALFORMED for row in read_file(path, COLUMNS))


def test_csv_rows_of_another_width_are_malformed(tmp_path: Path) -> None:
    content = b'id,body\n1,good\n2\n3,too,many\n\n4,"quoted\nnew\r\nlines, and ""quotes"""\n5,last'
    rows = rows_of(tmp_path, "x.csv", content)
    assert [(row.row, row.text) for row in rows if row.status == KEPT] == [
        (0, "good"),
        (4, 'quoted\nnew\r\nlines, and "quotes"'),
        (5, "last"),
    ]
    assert reasons(rows) == [
        (1, "1 fields where the header names 2"),
        (2, "3 fields where the header names 2"),
    ]


LEFT_OPEN = "; lines {} to {} were taken for one row, as by a quote left open"


def test_a_csv_quote_left_open_takes_no_row_along_unsaid(tmp_path: Path) -> None:
    content = b'id,body\n1,good\n2,"open\n3,lost\n4,"closes it"\n5,after\n6,"open\n7,"\n8,"open\n9,lost\n'
    rows = rows_of(tmp_path, "x.csv", content)
    assert [(row.row, row.id, row.text) for row in rows if row.status == KEPT] == [
        (0, "1", "good"),
        (2, "5", "after"),
        (3, "6", "open\n7,"),
    ]
    assert reasons(rows) == [
        (1, "not CSV: ',' expected after '\"'" + LEFT_OPEN.format(3, 5)),
        (4, "not CSV: unexpected end of data" + LEFT_OPEN.format(9, 10)),
    ]


def test_a_csv_row_of_several_lines_and_another_width_names_them(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "x.csv", b'id,body\n1,"open\n2,"\n3,"x",y\n4,"a\nb",c\n')
    assert reasons(rows) == [
        (1, "3 fields where the header names 2"),
        (2, "3 fields where the header names 2" + LEFT_OPEN.format(5, 6)),
    ]


def test_a_csv_quote_left_open_costs_a_mebibyte_of_rows_at_most(tmp_path: Path) -> None:
    line = b"7,a comment that is the same on each line\n"
    rows = rows_of(tmp_path, "x.csv", b'id,body\n1,"open\n' + line * 100_000)
    lost = ((1 << 20) - len(b'1,"open\n')) // len(line) + 1
    assert reasons(rows) == [(0, "not CSV: a row of more than 1,048,576 characters" + LEFT_OPEN.format(2, 2 + lost))]
    assert len(rows) == 1 + 100_000 - lost
    assert [row.row for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("line", [b"7,seven\n", b'p",x,"q\n'], ids=["one field", "many fields"])
def test_a_csv_quote_left_open_takes_bounded_memory(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, "x.csv", b'id,body\n1,"open\n' + line * (16_000_000 // len(line)))
    tracemalloc.start()
    first = next(read_file(path, COLUMNS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first.status == MALFORMED
    assert peak < 16_000_000


def test_a_long_csv_field_is_kept_on_one_line_and_on_some(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "some lines\n" * 90_000]
    rows = rows_of(tmp_path, "x.csv", as_csv([("1", texts[0]), ("2", texts[1])]))
    assert [row.text for row in rows] == [text.strip() for text in texts]


@pytest.mark.parametrize("content", [b'id,"body\n1,x\n', b'id,"body"x\n1,x\n', b'"id\n' + b"1,x\n" * 300_000])
def test_a_broken_csv_header_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.csv: its header is not CSV: "):
        rows_of(tmp_path, "x.csv", content)


def test_csv_keeps_control_characters_and_sets_broken_bytes_aside(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "x.csv", b"\xef\xbb\xbfbody\na\x00b\x1b\n\xff\n\xed\xa0\x80\nend\n")
    assert [(row.row, row.text) for row in rows if row.status == KEPT] == [(0, "a\x00b\x1b"), (3, "end")]
    assert reasons(rows) == [(1, "not UTF-8"), (2, "not UTF-8")]


def test_parquet_values_of_every_kind(tmp_path: Path) -> None:
    texts = strings([b"good", b"\xff broken", b"a\x00b"])
    rows = rows_of(tmp_path, "x.parquet", table_bytes(pa.table({"body": texts})))
    assert [row.text for row in rows if row.status == KEPT] == ["good", "a\x00b"]
    assert reasons(rows) == [(1, "not UTF-8")]
    for column, reason in [
        (pa.array(["x", None]), "the text is null"),
        (pa.array([1.5, 2.5]), "the text is float"),
        (pa.array([["x"], ["y"]]), "the text is list"),
        (pa.array([{"x": 1}, {"x": 2}]), "the text is dict"),
    ]:
        rows = rows_of(tmp_path, "x.parquet", table_bytes(pa.table({"body": column})))
        assert (1, reason) in reasons(rows)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
def test_parquet_text_may_have_any_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["x", "é"]).cast(kind)
    rows = rows_of(tmp_path, "x.parquet", table_bytes(pa.table({"body": texts})))
    assert [row.text for row in rows] == ["x", "é"]


def test_a_broken_id_does_not_lose_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table({"id": strings([b"a", b"\xff"]), "body": ["x", "y"]})
    rows = rows_of(tmp_path, "x.parquet", table_bytes(table))
    assert [(row.id, row.text) for row in rows] == [("a", "x"), ("?", "y")]


@pytest.mark.parametrize(("ending", "encode"), [(".jsonl", jsonl), (".csv", as_csv), (".parquet", parquet)])
def test_text_and_id_may_be_the_same_column(
    tmp_path: Path, ending: str, encode: Callable[[list[tuple[str, str]]], bytes]
) -> None:
    rows = rows_of(tmp_path, f"x{ending}", encode(GOOD[:2]), Columns("body", "body"))
    assert [(row.id, row.text) for row in rows] == [(body, body) for _, body in GOOD[:2]]


@pytest.mark.parametrize(("ending", "encode"), [(".jsonl", jsonl), (".csv", as_csv), (".parquet", parquet)])
def test_a_text_may_be_of_several_columns(
    tmp_path: Path, ending: str, encode: Callable[[list[tuple[str, str]]], bytes]
) -> None:
    columns = Columns("text", "id", task=tiny_task(input="From {id}: {body}"))
    rows = rows_of(tmp_path, f"x{ending}", encode(GOOD[:2]), columns)
    assert [row.text for row in rows] == [f"From {id_}: {body}".strip() for id_, body in GOOD[:2]]
    rows = rows_of(tmp_path, "x.jsonl", b'{"id": 1.5, "body": null}\n{"id": "a"}\n', columns)
    assert rows[0].text == "From 1.5:"
    assert rows[1].reason == "no key 'body'; it has id. Set the task's input"


@pytest.mark.parametrize(("ending", "encode"), [(".csv", as_csv), (".parquet", parquet)])
def test_a_missing_text_column_is_named(tmp_path: Path, ending: str, encode: Callable[[list[tuple[str, str]]], bytes]) -> None:
    with pytest.raises(UserError, match=r"no column 'text'; it has id, score, body\. Set comments\.text"):
        rows_of(tmp_path, f"x{ending}", encode(GOOD), Columns("text", "id"))


def test_a_file_without_the_answers_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,body\n1,a\n")
    with pytest.raises(UserError, match=r"no column 'label'; it has id, body\. Set --answers"):
        list(read_file(str(tmp_path / "x.csv"), Columns("body", "id", "label")))
    (tmp_path / "x.jsonl").write_text('{"body": "a", "topic": "b"}\n')
    (row,) = read_file(str(tmp_path / "x.jsonl"), Columns("body", "id", "label"))
    assert row.reason == "no key 'label'; it has body, topic. Set --answers (comments.answer)"


@pytest.mark.parametrize(("ending", "encode"), [(".jsonl", jsonl), (".csv", as_csv), (".parquet", parquet)])
def test_a_missing_id_column_gives_empty_ids(
    tmp_path: Path, ending: str, encode: Callable[[list[tuple[str, str]]], bytes]
) -> None:
    rows = rows_of(tmp_path, f"x{ending}", encode(GOOD), Columns("body", "name"))
    assert [row.id for row in rows] == [""] * len(GOOD)


@settings(max_examples=150)
@given(content=st.one_of(st.binary(max_size=200), st.text('{}[]":,\\u\nbodyd8 01', max_size=80).map(str.encode)))
def test_any_bytes_as_jsonl_are_numbered_by_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    rows = rows_of(tmp_path_factory.getbasetemp(), "any.jsonl", content)
    lines = [i for i, line in enumerate(content.split(b"\n")) if line.strip()]
    assert [row.row for row in rows] == lines


@settings(max_examples=150)
@given(lines=st.lists(st.one_of(st.none(), st.text(max_size=10), st.binary(max_size=10)), max_size=12))
def test_good_lines_among_bad_ones_keep_their_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str | bytes | None]
) -> None:
    written = [
        json.dumps({"body": line}).encode() if isinstance(line, str) else (line or b"").replace(b"\n", b"") for line in lines
    ]
    rows = rows_of(tmp_path_factory.getbasetemp(), "mixed.jsonl", b"\n".join(written))
    kept = {row.row: row.text for row in rows if row.status == KEPT}
    good = {i: line.strip() for i, line in enumerate(lines) if isinstance(line, str)}
    assert good.items() <= kept.items()


@settings(max_examples=100)
@given(content=st.binary(max_size=200), ending=st.sampled_from([".csv", ".parquet", ".jsonl.gz", ".csv.zst"]))
def test_any_bytes_in_any_format_raise_nothing_but_a_missing_column(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    prefix = b"body,id\n" if ending == ".csv" else b""
    try:
        rows_of(tmp_path_factory.getbasetemp(), f"any{ending}", prefix + content)
    except UserError as error:
        assert "no column" in str(error)  # noqa: PT017


def test_no_line_of_the_real_comments_is_lost(real_case: RealCase) -> None:
    rows = list(read_file(str(real_case.comments), COLUMNS))
    lines = gzip.decompress(real_case.comments.read_bytes()).splitlines()
    assert len(rows) == len(lines)
    assert sum(row.status == KEPT for row in rows) == sum(has_a_body(line) for line in lines)


def has_a_body(line: bytes) -> bool:
    with suppress(ValueError):
        row = json.loads(line)
        return isinstance(row, dict) and isinstance(row.get("body"), str) and bool(row["body"].strip())
    return False


def test_the_driver_takes_few_rows_at_a_time_however_large_ray_datas_blocks_are(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    start_ray()
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for path in paths:
        Path(path).write_text("".join(json.dumps({"body": f"good {i}", "id": i}) + "\n" for i in range(BATCH_ROWS + 500)))
    tables = list(comment_batches(paths, COLUMNS, tiny_task(), tokenizer))
    assert max(len(table) for table in tables) == BATCH_ROWS
    rows = pa.concat_tables(tables).select(["file", "row"]).to_pylist()
    assert [(row["file"], row["row"]) for row in rows] == [(f, i) for f in range(2) for i in range(BATCH_ROWS + 500)]
