from __future__ import annotations

import gc
import itertools
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from pipeline.base import storage
from pipeline.base.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "c.csv", "sub/d.jsonl", "sub/deep/e.jsonl", "with space.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def names(paths: list[str], root: Path) -> list[str]:
    """Paths or URIs below a folder, as they read on from it, each opened to see that it is there."""
    for path in paths:
        assert storage.read_text(path)
    return [storage.filesystem(path)[1].removeprefix(f"{root}/") for path in paths]


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("", ["a.jsonl", "b.jsonl", "c.csv", "with space.jsonl"]),
        ("sub", ["sub/d.jsonl"]),
        ("?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("*.csv", ["c.csv"]),
        ("*/*.jsonl", ["sub/d.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/d.jsonl", "sub/deep/e.jsonl", "with space.jsonl"]),
        ("sub/**/*.jsonl", ["sub/d.jsonl", "sub/deep/e.jsonl"]),
    ],
)
def test_expand(tree: Path, scheme: str, pattern: str, expected: list[str]) -> None:
    if scheme and "?" in pattern:
        pytest.skip("a question mark starts a URI's query")
    assert names(storage.expand(f"{scheme}{tree}/{pattern}"), tree) == expected


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("pattern", ["absent.jsonl", "*.parquet", "absent/*.jsonl"])
def test_expanding_to_nothing_is_an_error(tree: Path, scheme: str, pattern: str) -> None:
    with pytest.raises(UserError, match="no file at"):
        storage.expand(f"{scheme}{tree}/{pattern}")


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("a.b*", {"a.bc"}),
        ("?.b*", {"a.bc"}),
        ("(x)/*.jsonl", {"(x)/y.jsonl"}),
        ("[ac].jsonl", {"a.jsonl", "c.jsonl"}),
        ("**/x?.jsonl", {"p/q/x1.jsonl", "x1.jsonl"}),
        ("p/**", {"p/q/x1.jsonl"}),
    ],
)
def test_the_globs_of_uris(pattern: str, matching: set[str]) -> None:
    paths = ["a.bc", "aXbc", "(x)/y.jsonl", "x/y.jsonl", "a.jsonl", "c.jsonl", "p/q/x1.jsonl", "x1.jsonl", "x12.jsonl"]
    assert {path for path in paths if re.match(storage._glob_regex(pattern), path)} == matching


@pytest.mark.parametrize(
    ("uri", "inner", "path", "expected"),
    [
        ("s3://bucket/a/*.csv", "bucket/a/*.csv", "bucket/a/x y.csv", "s3://bucket/a/x%20y.csv"),
        ("s3://bucket/a/?region=x", "bucket/a/", "bucket/a/x.csv", "s3://bucket/a/x.csv?region=x"),
        ("hdfs://host:1/a%20b/*", "/a b/*", "/a b/c", "hdfs://host:1/a%20b/c"),
    ],
)
def test_the_uri_of_a_listed_file(uri: str, inner: str, path: str, expected: str) -> None:
    assert storage._beside(uri, inner, path) == expected


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_write_and_read(tmp_path: Path, scheme: str) -> None:
    path = f"{scheme}{tmp_path}/new/folder/x.json"
    storage.write_json(path, {"é": [1, None]})
    assert storage.read_json(path) == {"é": [1, None]}
    assert storage.exists(path)
    assert storage.exists(f"{scheme}{tmp_path}/new")
    assert not storage.exists(f"{scheme}{tmp_path}/absent")
    assert storage.list_files(f"{scheme}{tmp_path}/new/folder") == ["x.json"]
    storage.write_text(path, "again")
    assert storage.read_text(path) == "again"


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"x")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "x"
    storage.write_bytes(str(path), b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(path), b"new")
    assert os.listdir(tmp_path) == ["x"]
    assert path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(str(tmp_path / "x"), b"new")
    assert os.listdir(tmp_path) == []


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"old")
    with pytest.raises(RuntimeError, match="in the middle"):
        write_half(str(tmp_path / "x"))
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def write_half(path: str) -> None:
    with storage.writing(path) as stream:
        stream.write(b"half")
        raise RuntimeError("in the middle")


def test_a_block_that_fails_writes_nothing_to_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(storage, "filesystem", lambda path: (bucket, path))
    storage.write_bytes("x", b"old")
    with pytest.raises(RuntimeError, match="in the middle"):
        write_half("x")
    gc.collect()
    assert (tmp_path / "x").read_bytes() == b"old"


def test_content_that_is_no_bytes_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        storage.write_bytes(str(tmp_path / "x"), "text")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_missing_file_is_named(tmp_path: Path, scheme: str) -> None:
    for path in (f"{scheme}{tmp_path}/absent", f"{scheme}{tmp_path}"):
        with pytest.raises(UserError, match=f"no file at {path}"):
            storage.read_bytes(path)


def test_what_is_not_json_or_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"{")
    with pytest.raises(UserError, match="x is not JSON"):
        storage.read_json(str(tmp_path / "x"))
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(UserError, match="x is not UTF-8 text"):
        storage.read_json(str(tmp_path / "x"))


def test_files_of_a_missing_folder_are_none(tmp_path: Path) -> None:
    assert storage.list_files(str(tmp_path / "absent")) == []


def test_credentials_in_a_uri_are_refused_and_not_said() -> None:
    with pytest.raises(UserError, match="s3://bucket/a@b was given with credentials") as refused:
        storage.exists("s3://key:hush@bucket/a@b")
    assert "hush" not in str(refused.value)
    storage.refuse_credentials("s3://bucket/a@b")
    storage.refuse_credentials("/home/me@work/x")


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(UserError, match="cannot open nowhere://x"):
        storage.exists("nowhere://x")


def test_join_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.absolute("x") == str(tmp_path / "x")
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"
    assert not storage.is_uri("C:/x")


def local_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
    monkeypatch.setattr(storage, "filesystem", lambda path: (bucket, path))


MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "changed"),
    [(1, 0), (70_000, 69_999), (MIB, 0), (MIB, MIB // 2 + 7), (MIB, MIB - 1)]
    + [(5 * MIB + 3, at) for at in (0, 65_535, (5 * MIB + 3 - 65_536) // 15 + 9, 5 * MIB - 65_533, 5 * MIB + 2)],
)
def test_a_fingerprint_sees_a_change_of_equal_size(tmp_path: Path, size: int, changed: int) -> None:
    content, path = bytearray(size), tmp_path / "x"
    path.write_bytes(content)
    before = storage.fingerprint(str(path))
    content[changed] = 1
    path.write_bytes(content)
    assert storage.fingerprint(str(path)) != before


def test_a_fingerprint_is_of_the_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [0, 1, 65_536, MIB - 1, MIB, MIB + 1, 2 * MIB]
    for size in sizes:
        (tmp_path / f"{size}").write_bytes(bytes(size))
        (tmp_path / f"again-{size}").write_bytes(bytes(size))
    found = [storage.fingerprint(str(tmp_path / f"{size}")) for size in sizes]
    assert len(set(found)) == len(sizes)
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in found)
    assert found == [storage.fingerprint(f"file://{tmp_path}/again-{size}") for size in sizes]
    local_bucket(tmp_path, monkeypatch)
    assert found == [storage.fingerprint(f"{size}") for size in sizes]


def test_the_fingerprint_of_a_huge_file_takes_a_few_reads(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        stream.truncate(1 << 40)
    assert storage.fingerprint(str(tmp_path / "x"))
    starts = storage._sample_starts(1 << 40)
    assert len(starts) == 16
    assert (starts[0], starts[-1]) == (0, (1 << 40) - 65_536)
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1


def test_a_file_that_cannot_be_read_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no file at {tmp_path}/absent"):
        storage.fingerprint(str(tmp_path / "absent"))


@pytest.mark.parametrize("read", [storage.read_bytes, storage.fingerprint, storage.regular_file])
def test_what_may_never_end_is_not_opened(tmp_path: Path, read: Callable[[str], Any]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("fifo", "device"):
        with pytest.raises(UserError, match=f"no file at {tmp_path}/{name}: what is there is a folder, a FIFO or a device"):
            read(str(tmp_path / name))


def test_a_form_names_three_keys_that_are_wrong(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    storage.write_json(path, {"a": 1, "b": "2", "c": "x", "d": None, "e": []})
    with pytest.raises(UserError, match=r"^\S+x is damaged, or .* it: c: Input .*; d: Input .*; e: Input [^;\n]*$"):
        storage.read_form(path, dict[str, int])
    storage.write_json(path, dict.fromkeys("abcde"))
    with pytest.raises(UserError, match=r"a: .*; b: .*; c: [^;\n]* and 2 more$"):
        storage.read_form(path, dict[str, int])
    storage.write_json(path, {"a": 1})
    assert storage.read_form(path, dict[str, int]) == {"a": 1}


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.int32)},
        {"a": np.zeros(2, np.int32)},
        {"a": np.zeros((2, 1), np.float32)},
    ],
    ids=["none", "one too many", "another dtype", "another form"],
)
def test_arrays_of_another_form_are_refused(tmp_path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    path, form = str(tmp_path / "x"), {"a": (np.float32, 1)}
    storage.write_bytes(path, save_tensors(tensors))
    with pytest.raises(UserError, match=r"x is damaged, or another file: it must hold a \(1-dimensional float32\)"):
        storage.read_tensors(path, form)
    storage.write_bytes(path, save_tensors({"a": np.ones(2, np.float32)}))
    assert storage.read_tensors(path, form)["a"].tolist() == [1, 1]


def test_a_raw_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    with storage.RawFile(str(tmp_path / "x"), seekable=True) as raw:
        assert (raw.seek(-3, os.SEEK_END), raw.tell(), raw.read()) == (7, 7, b"789")
        assert (raw.seek(1), raw.read(3), raw.tell()) == (1, b"123", 4)
    raw = storage.RawFile(str(tmp_path / "x"))
    assert (raw.seekable(), raw.readable(), raw.read(4), raw.read(), raw.read()) == (False, True, b"0123", b"456789", b"")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_sweep_deletes_what_killed_writes_left(tmp_path: Path, scheme: str) -> None:
    kept = ["x", ".hidden", "x.writing-", "sub/.writing-deep"]
    for name in [*kept, ".writing-abc", ".writing-def"]:
        storage.write_text(str(tmp_path / name), "x")
    storage.sweep(f"{scheme}{tmp_path}")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    storage.sweep(f"{scheme}{tmp_path}/absent")


def test_a_sweep_leaves_buckets_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".writing-abc").write_text("an object of somebody's")
    local_bucket(tmp_path, monkeypatch)
    storage.sweep(".")
    assert os.listdir(tmp_path) == [".writing-abc"]
