"""Reads comments from JSONL, Parquet and CSV, plain or compressed, and filters them. One file is read front to back."""

from __future__ import annotations

import csv
import hashlib
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

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.version import check_code_version
from pipeline.config import CommentsConfig
from pipeline.task.given_shares import fit_shares
from pipeline.task.task import CommentRules, Task
from pipeline.task.tokenization import TextTokenizer

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")
BATCH_ROWS = 2048
BLOCK_BYTES = 8 << 20  # of rows that a reader hands on at once: it holds them several times, and a core has two readers
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
        pa.field("answer", pa.list_(pa.int32())),  # a given answer's tokens, end token last; empty where none is given
        pa.field(
            "shares", pa.string()
        ),  # of each value of each field beside a given answer, as JSON; empty where none are given
        pa.field("gold", pa.list_(pa.int32())),  # the same of people's label; empty where it is none of the task's answers
        pa.field("status", pa.string()),  # KEPT, MALFORMED or one of DROPS
        pa.field("reason", pa.string()),  # of MALFORMED rows
    ]
)


@dataclass(frozen=True)
class Comment:
    """One row of an input file."""

    row: int
    id: str = ""
    text: str = ""
    status: str = KEPT
    reason: str = ""
    tokens: list[int] = field(default_factory=list)
    given: Any = None  # an answer as it was read
    answer: list[int] = field(default_factory=list)  # and its tokens
    likely: Any = None  # the shares of values, as they were read
    shares: str = ""  # and as JSON in the task's order
    labels: Any = None  # people's, as they were read
    gold: list[int] = field(default_factory=list)  # and their tokens

    @property
    def set_aside(self) -> str | None:
        """Why it is not answered, None where it is: the word it is counted under, then what more is known."""
        if self.status == KEPT:
            return None
        return f"{self.status}: {self.reason}" if self.reason else self.status


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; `task` joins the text where it is of several."""

    text: str
    id: str
    answer: str | None = None
    gold: str | None = None
    probabilities: str | None = None
    task: Task | None = None

    @staticmethod
    def of(config: CommentsConfig, task: Task | None = None) -> Columns:
        """Those of a configuration, and of a task."""
        return Columns(config.text, config.id, config.answer, config.gold, config.probabilities, task)

    @property
    def texts(self) -> list[str]:
        """The columns of the text."""
        return (self.task.columns if self.task else []) or [self.text]

    def joined(self, record: dict[str, Any]) -> Any:
        """The text of a row."""
        parts = {name: _decoded(record[name]) for name in self.texts}
        return self.task.text_of(parts) if self.task and self.task.input else parts[self.text]

    @property
    def answers(self) -> list[str]:
        """The columns of a given answer: one that holds all of it, or one for each field."""
        return _names(self.answer)

    @property
    def labels(self) -> list[str]:
        """The same of people's labels."""
        return _names(self.gold)

    @property
    def required(self) -> list[str]:
        """Those that must be there."""
        return [*self.texts, *self.answers, *self.labels, *_names(self.probabilities)]

    def require_fields(self, task: Task) -> None:
        """Refuses several columns of answers that are not the task's fields.

        Raises:
            UserError: naming both.
        """
        for option, names in (("--answers", self.answers), ("comments.gold", self.labels)):
            if len(names) > 1 and set(names) != set(task.fields):
                raise UserError(
                    f"{option} names the columns {', '.join(names)}, but the task's fields are {', '.join(task.fields)}: "
                    "name one column that holds the whole answer, or a column for each field under the field's name"
                )


def _names(columns: str | None) -> list[str]:
    return [name.strip() for name in columns.split(",")] if columns else []


def text_key(text: str) -> bytes:
    """Tells texts apart, but for their case and spacing: 32 bytes, spread evenly."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()


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


def read_file(path: str, columns: Columns) -> Iterator[Comment]:
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


def _read_jsonl(_path: str, stream: io.BufferedReader, columns: Columns) -> Iterator[Comment]:
    for row, line in enumerate(stream):
        if line.strip():
            yield _parse_line(row, line, columns)


def _parse_line(row: int, line: bytes, columns: Columns) -> Comment:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return _malformed(row, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return _malformed(row, f"not JSON: {error}")
    if not isinstance(record, dict):
        return _malformed(row, f"a JSON object was expected, not {type(record).__name__}")
    for name in columns.required:
        if name not in record:
            return _malformed(row, _no_column("key", name, columns, record))
    return _checked(row, record, columns)


def _read_csv(path: str, stream: io.BufferedReader, columns: Columns) -> Iterator[Comment]:
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    reader = csv.reader(lines, strict=True)  # not strict, it runs on over a quote left open, and makes one row of several
    header = _header(path, reader)
    _require_columns(path, columns, header)
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
            yield _checked(row, dict(zip(header, record, strict=True)), columns)


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


def _read_parquet(path: str, stream: Any, columns: Columns) -> Iterator[Comment]:
    file = pq.ParquetFile(stream if stream.seekable() else pa.BufferReader(stream.read()))  # a compressed one cannot seek
    names = file.schema_arrow.names
    _require_columns(path, columns, names)
    wanted = list(dict.fromkeys([*columns.required, *[columns.id] * (columns.id in names)]))
    rows = itertools.count()
    for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
        for record in zip(*(_python_values(batch[name]) for name in wanted), strict=True):
            yield _checked(next(rows), dict(zip(wanted, record, strict=True)), columns)


def _python_values(column: pa.Array) -> list[Any]:
    """A column's values; strings as bytes, since Parquet may hold text that is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return list(column.cast(pa.large_binary()).to_pylist())
    return list(column.to_pylist())


def _require_columns(path: str, columns: Columns, names: Iterable[str]) -> None:
    for name in columns.required:
        if name not in names:
            raise UserError(f"{path}: {_no_column('column', name, columns, names)}")


def _no_column(what: str, name: str, columns: Columns, names: Iterable[str]) -> str:
    keys = {columns.text: "comments.text", columns.probabilities or "": "comments.probabilities"}
    keys |= dict.fromkeys(columns.task.columns if columns.task else [], "the task's input")
    keys |= dict.fromkeys(columns.labels, "comments.gold") | dict.fromkeys(columns.answers, "--answers (comments.answer)")
    key = keys[name]
    return f"no {what} {name!r}; it has {', '.join(names) or 'none'}. Set {key}"


def _checked(row: int, record: dict[str, Any], columns: Columns) -> Comment:
    id_ = _decoded(record.get(columns.id))
    name = "" if id_ is None else str(id_).encode("utf-8", "replace").decode()
    checked = replace(text_row(row, columns.joined(record)), id=name)
    if checked.status != KEPT:
        return checked
    likely = record[columns.probabilities] if columns.probabilities else None
    given, labels = (_given(record, names) for names in (columns.answers, columns.labels))
    return replace(checked, given=given, likely=_decoded(likely), labels=labels)


def _given(record: dict[str, Any], names: list[str]) -> Any:
    """An answer that a row holds: the value of its one column, or those of several by name; None where it has no column."""
    given = {name: _decoded(record[name]) for name in names}
    return given if len(given) > 1 else next(iter(given.values()), None)


def text_row(row: int, text: Any) -> Comment:
    """The row of a comment: a string of whole characters, without the white space around it; anything else is malformed."""
    if not isinstance(text, str):
        return _malformed(row, "the text is null" if text is None else f"the text is {type(text).__name__}")
    try:
        text.encode()  # faster than to look at each character
    except UnicodeEncodeError:
        return _malformed(row, "not UTF-8")
    return Comment(row, text=text.strip())


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _malformed(row: int, reason: str) -> Comment:
    return Comment(row, status=MALFORMED, reason=reason[:500])


def filter_rows(rows: Iterable[Comment], rules: CommentRules, tokenizer: TextTokenizer) -> list[Comment]:
    """Tokenizes rows and marks those the rules drop; a dropped row keeps neither text nor tokens.

    A text of more characters than the longest tokens could make up is too long, whatever else it is, and nothing looks at it.
    """
    special, most = list(tokenizer.special_tokens.values()), rules.max_tokens * tokenizer.characters_per_token
    marked = [_filter_text(row, rules, special, most) for row in rows]
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


def _filter_text(row: Comment, rules: CommentRules, special: list[str], most: int) -> Comment:
    if row.status != KEPT:
        return row
    if len(row.text) > most:
        return replace(row, text="", status="too_long")
    if not rules.special_tokens and any(token in row.text for token in special):
        return replace(row, text="", status="special_tokens")
    if not rules.urls and URL.search(row.text):
        return replace(row, text="", status="urls")
    return row


def tokenize_answers(rows: list[Comment], task: Task, tokenizer: TextTokenizer) -> list[Comment]:
    """Gives kept rows their answer's tokens; a row whose answer does not fit the task is malformed."""
    texts: list[str] = []
    marked = list(rows)
    for i, row in enumerate(rows):
        values = task.fit(row.given)
        if row.status == KEPT and values is None:
            marked[i] = replace(row, status=MALFORMED, text="", tokens=[], reason=_misfit(row.given, task))
        texts.append(task.render(values) if values else "")
    for i, ids in enumerate(tokenizer.encode(texts)):
        if marked[i].status == KEPT:
            marked[i] = replace(marked[i], answer=[*ids, tokenizer.end_id])
    return marked


def check_shares(rows: list[Comment], task: Task) -> list[Comment]:
    """Gives kept rows the shares of their values; a row whose shares do not fit the task is malformed."""
    checked = []
    for row in rows:
        try:
            shares = json.dumps(fit_shares(task, row.likely)) if row.status == KEPT else ""
            checked.append(replace(row, shares=shares))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"the probabilities do not fit the task: {error}"
            checked.append(replace(row, status=MALFORMED, text="", tokens=[], answer=[], reason=reason))
    return checked


def tokenize_labels(rows: list[Comment], task: Task, tokenizer: TextTokenizer) -> list[Comment]:
    """Gives kept rows their label's tokens, where it fits the task."""
    values = [task.fit(row.labels) if row.status == KEPT else None for row in rows]
    ids = tokenizer.encode([task.render(label) if label else "" for label in values])
    return [
        replace(row, gold=[*tokens, tokenizer.end_id]) if label else row
        for row, label, tokens in zip(rows, values, ids, strict=True)
    ]


def _misfit(given: Any, task: Task) -> str:
    """Why a given answer does not fit a task, and what would."""
    if given in (None, ""):
        return "no answer is given"
    whole = isinstance(given, dict) or len(task.fields) == 1
    hint = "" if whole else f"; for a column each: --answers {','.join(task.fields)}"
    return f"the answer does not fit the task: {task.misfit(given)}{hint}"


def comment_batches(paths: list[str], columns: Columns, task: Task, tokenizer: TextTokenizer) -> Iterator[pa.Table]:
    """All rows of all files in order, with the columns of `SCHEMA`. Files are read in parallel, under Ray Data."""
    import ray.data  # a second to import, and predicting does without it

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    files = [{"file": i, "path": path} for i, path in enumerate(paths)]
    source = ray.data.from_items(files, override_num_blocks=len(files))
    settings = {"columns": columns, "task": task, "serialized": tokenizer.serialized, "end_id": tokenizer.end_id}
    dataset = source.map_batches(_file_batches, batch_size=1, fn_kwargs=settings, num_cpus=0.5)
    yield from dataset.iter_batches(batch_size=BATCH_ROWS, batch_format="pyarrow")  # a block may have a million rows


def _file_batches(batch: dict[str, Any], columns: Columns, task: Task, serialized: str, end_id: int) -> Iterator[pa.Table]:
    check_code_version()
    yield from _file_tables(int(batch["file"][0]), str(batch["path"][0]), columns, task, _tokenizer(serialized, end_id))


def comment_tables(paths: list[str], columns: Columns, task: Task, tokenizer: TextTokenizer) -> Iterator[pa.Table]:
    """The same in this process, one file after another."""
    for file, path in enumerate(paths):
        yield from _file_tables(file, path, columns, task, tokenizer)


def _file_tables(file: int, path: str, columns: Columns, task: Task, tokenizer: TextTokenizer) -> Iterator[pa.Table]:
    rows = read_file(path, columns)
    while marked := filter_rows(itertools.islice(rows, BATCH_ROWS), task.comments, tokenizer):
        marked = tokenize_answers(marked, task, tokenizer) if columns.answer else marked
        marked = check_shares(marked, task) if columns.probabilities else marked
        yield _table(file, tokenize_labels(marked, task, tokenizer) if columns.gold else marked)


@cache
def _tokenizer(serialized: str, end_id: int) -> TextTokenizer:
    return TextTokenizer(serialized, end_id)


def _table(file: int, rows: list[Comment]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names if name != "file"}
    return pa.table({"file": [file] * len(rows), **columns}, schema=SCHEMA)
