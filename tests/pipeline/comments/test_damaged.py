from __future__ import annotations

import errno
import io
import itertools
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.comments import reading as comments
from pipeline.comments.reading import KEPT, MALFORMED, read_file
from tests.pipeline.comments.comment_files import COLUMNS, as_csv, compress, jsonl, parquet, rows_of


@pytest.mark.parametrize(("ending", "encode"), [(".jsonl", jsonl), (".csv", as_csv), (".parquet", parquet)])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_the_rest_of_a_truncated_file_is_one_malformed_row(
    tmp_path: Path, ending: str, compression: str, share: float, encode: Callable[[list[tuple[str, str]]], bytes]
) -> None:
    many = [(str(i), f"comment {i * i * 31 % 977} of {i * 7919 % 1009}") for i in range(20_000)]
    whole = compress(encode(many), compression)
    content = whole[: max(6, int(len(whole) * share))]
    rows = rows_of(tmp_path, f"x{ending}{compression}", content)
    good = [row for row in rows if row.status == KEPT]
    assert [(row.id, row.text) for row in good[:-1]] == many[: max(0, len(good) - 1)]
    assert len(good) < len(many)
    assert rows[-1].status == MALFORMED
    assert [row.row for row in rows] == list(range(len(rows)))


def test_a_truncated_file_gives_nearly_all_that_it_holds(tmp_path: Path) -> None:
    many = [(str(i), f"comment {i * i * 31 % 977} of {i * 7919 % 1009}") for i in range(40_000)]
    content = compress(jsonl(many), ".gz")[:-40_000]
    held = zlib.decompressobj(wbits=31).decompress(content).count(b"\n")
    rows = rows_of(tmp_path, "x.jsonl.gz", content)
    assert held - 500 < len(rows) <= held + 1


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_bytes_overwritten_within_a_compressed_file_end_it(tmp_path: Path, compression: str) -> None:
    many = [(str(i), f"comment {i * i * 31 % 977} of {i * 7919 % 1009}") for i in range(20_000)]
    content = compress(jsonl(many), compression)
    half = len(content) // 2
    rows = rows_of(tmp_path, f"x.jsonl{compression}", content[:half] + b"\x00" * 200 + content[half + 200 :])
    assert "the rest of the file cannot be read" in rows[-1].reason
    assert rows[-1].row == len(rows) - 1


def test_a_corrupt_page_of_a_parquet_file_ends_it(tmp_path: Path) -> None:
    rows = [(str(i), f"comment {i}") for i in range(5000)]
    content = bytearray(parquet(rows))
    content[len(content) // 3 : len(content) // 2] = b"\xff" * (len(content) // 2 - len(content) // 3)
    found = rows_of(tmp_path, "x.parquet", bytes(content))
    assert found[-1].status == MALFORMED
    assert "cannot be read" in found[-1].reason


@pytest.mark.parametrize("ending", [".jsonl.gz", ".csv.gz", ".csv.zst", ".parquet.gz", ".parquet"])
def test_a_file_that_is_not_what_its_name_says_is_malformed(tmp_path: Path, ending: str) -> None:
    (row,) = rows_of(tmp_path, f"x{ending}", b"neither compressed nor Parquet\n")
    assert (row.row, row.status) == (0, MALFORMED)


class FaultyFile(io.BytesIO):
    """A file in a store whose n-th read fails, and each after it."""

    def __init__(self, content: bytes, nth: int, fault: Exception) -> None:
        super().__init__(content)
        self._left, self._fault = nth, fault

    def read(self, size: int | None = -1) -> bytes:
        self._left -= 1
        if self._left <= 0:
            raise self._fault
        return super().read(size)


class FaultyStore:
    """A filesystem with one file."""

    def __init__(self, content: bytes, nth: int, fault: Exception) -> None:
        self.file = FaultyFile(content, nth, fault)

    def open_input_file(self, _path: str) -> pa.NativeFile:
        return pa.PythonFile(self.file, mode="r")

    def open_input_stream(self, _path: str, compression: None) -> pa.NativeFile:
        assert compression is None
        return self.open_input_file(_path)


def parquet_in_parts(rows: list[tuple[str, str]]) -> bytes:
    """Row groups that are read one by one, as a column that nobody wants lies between."""
    ids, bodies = zip(*rows, strict=True)
    others = [random.Random(i).randbytes(40).hex() for i in range(len(rows))]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ids, "body": bodies, "other": others}), buffer, row_group_size=1000)
    return buffer.getvalue()


FAULTS = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "denied"),
    pa.ArrowInvalid("the bucket is odd"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("ending", "encode"), [(".jsonl", jsonl), (".csv", as_csv), (".parquet", parquet_in_parts)])
def test_a_fault_of_the_storage_ends_the_run_and_no_file(
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    compression: str,
    encode: Callable[[list[tuple[str, str]]], bytes],
    fault: Exception,
) -> None:
    many = [(str(i), f"comment {i * i * 31 % 977} of {i * 7919 % 1009}") for i in range(3000)]
    content, path = compress(encode(many), compression), f"s3://x{ending}{compression}"
    monkeypatch.setattr(comments, "READ_BYTES", 4096)
    for nth in itertools.count(1):
        store, rows = FaultyStore(content, nth, fault), []
        monkeypatch.setattr(storage, "filesystem", lambda path, store=store: (store, path))
        try:
            rows += read_file(path, COLUMNS)
        except UserError as error:
            assert str(error) == f"cannot read {path}: {fault}. Once it can be read, the same command goes on from there"  # noqa: PT017
        else:
            break
    assert nth > 3
    assert [(row.id, row.text) for row in rows] == many


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.jsonl.gz", "x.parquet"):
        with pytest.raises(UserError, match=f"cannot read {tmp_path}/{name}: .*the same command goes on from there"):
            list(read_file(str(tmp_path / name), COLUMNS))
