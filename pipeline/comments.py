"""Reads comments from JSONL, Parquet and CSV, plain or compressed, and filters them. One file is read front to back."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from cluster.version import check_code_version
from pipeline import storage
from pipeline.errors import UserError
from pipeline.task import CommentRules
from pipeline.tokenization import TextTokenizer

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")
BATCH_ROWS = 2048
READ_BYTES = 1 << 20  # of a file at once: a bucket answers each read with a request
CSV_ROW = 1 << 20  # characters from which a CSV row of several lines is given up, as one whose quote was left open
URL = re.compile(r"https?://|\bwww\.", re.IGNORECASE)

KEPT, MALFORMED = "kept", "malformed"
DROPS = ("special_tokens", "urls", "too_short", "too_long")

SCHEMA = pa.schema(
    [
        pa.field("file", pa.int32()),  # index in the plan's list of files
        pa.field("row", pa.int64()),  # from 0: the line of a JSONL file, the record of a CSV or Parquet file
        pa.field("id", pa.string()),  # the comment's own id, "" where it has none
        pa.field("text", pa.string()),
        pa.field("tokens", pa.list_(pa.int32())),  # the comment's text in the teacher's tokens
        pa.field("status", pa.string()),  # KEPT, MALFORMED or one of DROPS
        pa.field("reason", pa.string()),  # of MALFORMED rows
    ]
)


@dataclass(frozen=True)
class Row:
    """One row of an input file."""

    row: int
    id: str = ""
    text: str = ""
    status: str = KEPT
    reason: str = ""
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read."""

    text: str
    id: str


def file_format(path: str) -> tuple[str, str | None]:
    """The format and the compression a file's name ends with.

    Raises:
        UserError: neither is known.
    """
    compression = next((name for ending, name in COMPRESSIONS.items() if path.endswith(ending)), None)
    stem = path.rsplit(".", 1)[0] if compression else path
    for ending in FORMATS:
        if stem.endswith(ending):
            return ending, compression
    raise UserError(f"{path}: comments are read from {', '.join(FORMATS)}, plain, .gz or .zst")


def read_file(path: str, columns: Columns) -> Iterator[Row]:
    """The rows of one file; a row or a rest whose content is broken comes as malformed, with its reason.

    Raises:
        UserError: a Parquet or CSV file has no such text column, or the storage fails to give the file's bytes.
    """
    ending, compression = file_format(path)
    stream = _open(path, compression, seekable=ending == ".parquet" and not compression)
    read = {".parquet": _read_parquet, ".csv": _read_csv}.get(ending, _read_jsonl)
    following = 0
    try:
        for row in read(path, stream, columns):
            following = row.row + 1
            yield row
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        yield _malformed(following, f"the rest of the file cannot be read: {error}")


def _open(path: str, compression: str | None, seekable: bool) -> Any:
    """A stream of the file's content, decompressed."""
    raw = storage.RawFile(path, seekable)
    if seekable:
        return pa.PythonFile(raw, mode="r")
    buffered = io.BufferedReader(raw, READ_BYTES)
    if not compression:
        return buffered
    # the default buffer, as what was read ahead of a broken place is lost with it
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), compression))


def _read_jsonl(_path: str, stream: io.BufferedReader, columns: Columns) -> Iterator[Row]:
    for row, line in enumerate(stream):
        if line.strip():
            yield _parse_line(row, line, columns)


def _parse_line(row: int, line: bytes, columns: Columns) -> Row:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return _malformed(row, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return _malformed(row, f"not JSON: {error}")
    if not isinstance(record, dict):
        return _malformed(row, f"a JSON object was expected, not {type(record).__name__}")
    if columns.text not in record:
        return _malformed(row, f"no key {columns.text!r}")
    return _checked(row, record.get(columns.id), record[columns.text])


def _read_csv(path: str, stream: io.BufferedReader, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    reader = csv.reader(lines, strict=True)  # not strict, it runs on over a quote left open, and makes one row of several
    header = _header(path, reader)
    _require_column(path, columns.text, header)
    for row in itertools.count():
        first, lines.taken = reader.line_num + 1, 0
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _malformed(row, f"not CSV: {error}{_several(first, reader.line_num)}")
            continue
        if record and len(record) != len(header):
            several = _several(first, reader.line_num)
            yield _malformed(row, f"{len(record)} fields where the header names {len(header)}{several}")
        elif record:
            named = dict(zip(header, record, strict=True))
            yield _checked(row, named.get(columns.id), named[columns.text])


class _Lines:
    """A text's lines for the CSV reader, which goes on with the next line as a new row when it gets too many for one."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.taken = 0  # characters of this row

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.taken > CSV_ROW:
            self.taken = 0
            raise csv.Error(f"a row of more than {CSV_ROW:,} characters")
        line = next(self._text)
        self.taken += len(line)
        return line


def _header(path: str, reader: Iterator[list[str]]) -> list[str]:
    try:
        return next(reader, [])
    except csv.Error as error:
        raise UserError(f"{path}: its header is not CSV: {error}") from error


def _several(first: int, last: int) -> str:
    """Says which lines a broken row took with it, if more than one."""
    return f"; lines {first} to {last} were taken for one row, as by a quote left open" if last > first else ""


def _read_parquet(path: str, stream: Any, columns: Columns) -> Iterator[Row]:
    file = pq.ParquetFile(stream if stream.seekable() else pa.BufferReader(stream.read()))  # a compressed one cannot seek
    names = file.schema_arrow.names
    _require_column(path, columns.text, names)
    wanted = [columns.text] + [columns.id] * (columns.id in names)
    rows = itertools.count()
    for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
        texts = _python_values(batch[columns.text])
        ids = _python_values(batch[columns.id]) if columns.id in names else [None] * len(texts)
        for text, id_ in zip(texts, ids, strict=True):
            yield _checked(next(rows), id_, text)


def _python_values(column: pa.Array) -> list[Any]:
    """A column's values; strings as bytes, since Parquet may hold text that is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return list(column.cast(pa.large_binary()).to_pylist())
    return list(column.to_pylist())


def _require_column(path: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise UserError(f"{path} has no column {name!r}; it has {', '.join(names) or 'none'}. Set comments.text")


def _checked(row: int, id_: Any, text: Any) -> Row:
    """A row whose text is a string of whole characters, or a malformed one."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if isinstance(id_, bytes):
        id_ = id_.decode("utf-8", "surrogateescape")
    name = "" if id_ is None else str(id_).encode("utf-8", "replace").decode()
    if not isinstance(text, str):
        return replace(_malformed(row, "the text is null" if text is None else f"the text is {type(text).__name__}"), id=name)
    if any("\ud800" <= character <= "\udfff" for character in text):
        return replace(_malformed(row, "not UTF-8"), id=name)
    return Row(row, name, text.strip())


def _malformed(row: int, reason: str) -> Row:
    return Row(row, status=MALFORMED, reason=reason[:500])


def filter_rows(rows: list[Row], rules: CommentRules, tokenizer: TextTokenizer) -> list[Row]:
    """Tokenizes rows and marks those the rules drop; a dropped row keeps neither text nor tokens."""
    special = list(tokenizer.special_tokens.values())
    marked = [_filter_text(row, rules, special) for row in rows]
    kept = [i for i, row in enumerate(marked) if row.status == KEPT]
    for i, ids in zip(kept, tokenizer.encode([marked[i].text for i in kept]), strict=True):
        if tokenizer.has_control(ids):
            marked[i] = replace(marked[i], text="", status="special_tokens")
        elif len(ids) < rules.min_tokens:
            marked[i] = replace(marked[i], text="", status="too_short")
        elif len(ids) > rules.max_tokens:
            marked[i] = replace(marked[i], text="", status="too_long")
        else:
            marked[i] = replace(marked[i], tokens=ids)
    return marked


def _filter_text(row: Row, rules: CommentRules, special: list[str]) -> Row:
    if row.status != KEPT:
        return row
    if not rules.special_tokens and any(token in row.text for token in special):
        return replace(row, text="", status="special_tokens")
    if not rules.urls and URL.search(row.text):
        return replace(row, text="", status="urls")
    return row


def comment_dataset(paths: list[str], columns: Columns, rules: CommentRules, tokenizer: TextTokenizer) -> ray.data.Dataset:
    """All rows of all files in order, as a Ray Dataset with the columns of `SCHEMA`. Files are read in parallel."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    files = [{"file": i, "path": path} for i, path in enumerate(paths)]
    source = ray.data.from_items(files, override_num_blocks=len(files))
    settings = {"columns": columns, "rules": rules, "serialized": tokenizer.serialized, "end_id": tokenizer.end_id}
    return source.map_batches(_read_and_filter, batch_size=1, fn_kwargs=settings, num_cpus=0.5)


def _read_and_filter(
    batch: dict[str, Any], columns: Columns, rules: CommentRules, serialized: str, end_id: int
) -> Iterator[pa.Table]:
    check_code_version()
    file, path = int(batch["file"][0]), str(batch["path"][0])
    rows = read_file(path, columns)
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        yield _table(file, filter_rows(chunk, rules, _tokenizer(serialized, end_id)))


@cache
def _tokenizer(serialized: str, end_id: int) -> TextTokenizer:
    return TextTokenizer(serialized, end_id)


def _table(file: int, rows: list[Row]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names if name != "file"}
    return pa.table({"file": [file] * len(rows), **columns}, schema=SCHEMA)
