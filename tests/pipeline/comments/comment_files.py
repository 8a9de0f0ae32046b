"""Files of comments in every format, and what is read from them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.comments.reading import MALFORMED, Columns, Comment, read_file

COLUMNS = Columns(text="body", id="id")
GOOD = [("a", "I love it"), ("b", 'quotes " and, commas'), ("", "two\nlines"), ("d", "é 日本 😀"), ("e", "x" * 100_000)]


def compress(content: bytes, ending: str) -> bytes:
    if not ending:
        return content
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, {".gz": "gzip", ".zst": "zstd"}[ending]) as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def jsonl(rows: list[tuple[str, str]]) -> bytes:
    return b"".join(json.dumps({"id": id_, "body": body, "score": 1}).encode() + b"\n" for id_, body in rows)


def as_csv(rows: list[tuple[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("id", "score", "body"), *((id_, 1, body) for id_, body in rows)])
    return text.getvalue().encode()


def parquet(rows: list[tuple[str, str]]) -> bytes:
    ids, bodies = zip(*rows, strict=True)
    return table_bytes(pa.table({"id": ids, "score": [1] * len(rows), "body": bodies}))


def table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def rows_of(folder: Path, name: str, content: bytes, columns: Columns = COLUMNS) -> list[Comment]:
    return list(read_file(write(folder, name, content), columns))


def reasons(rows: list[Comment]) -> list[tuple[int, str]]:
    return [(row.row, row.reason) for row in rows if row.status == MALFORMED]
