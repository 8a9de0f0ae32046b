"""Each I/O call of a write fails in its turn, or ends the process in its middle: what lies at the place is always whole."""

from __future__ import annotations

import builtins
import errno
import gc
import io
import itertools
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from pipeline.base import storage
from pipeline.shards.files import committed_units, read_shard, shard_path
from tests.pipeline.shards.test_files import write as write_shard

CALLS = {
    "disk": ["makedirs", "mkstemp", "fdopen", "write", "flush", "fsync", "close", "chmod", "replace"],
    "bucket": ["open_output_stream", "write", "close"],
}
OLD, NEW = b"old" * 100, b"new content" * 20_000


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def kill() -> None:
    os._exit(1)


def interrupt() -> None:
    """Ctrl-C: raises KeyboardInterrupt in the main thread, whichever thread calls this."""
    signal.raise_signal(signal.SIGINT)


class Faults:
    """Counts I/O calls. The n-th does half its work, and its fault happens."""

    def __init__(self, nth: int = 0, fault: Callable[[], None] = no_space) -> None:
        self._nth, self._fault = nth, fault
        self.calls: list[str] = []

    def reach(self, name: str, half: Callable[[], Any] = lambda: None) -> None:
        self.calls.append(name)
        if len(self.calls) == self._nth:
            half()
            self._fault()

    @property
    def happened(self) -> bool:
        return 0 < self._nth <= len(self.calls)


class DiskStream:
    """A file open for writing."""

    def __init__(self, stream: io.BufferedWriter, faults: Faults) -> None:
        self._stream, self._faults = stream, faults

    def write(self, content: bytes | memoryview) -> int:
        self._faults.reach("write", lambda: (self._stream.write(content[: len(content) // 2]), self._stream.flush()))
        return self._stream.write(content)

    def flush(self) -> None:
        self._faults.reach("flush")
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def __enter__(self) -> DiskStream:
        return self

    def __exit__(self, *_: object) -> None:
        with self._stream:
            self._faults.reach("close")


class Upload(io.RawIOBase):
    """A stream to a bucket. Closing it, also by forgetting it, completes it with what it has, unless a part has failed."""

    def __init__(self, path: str, faults: Faults) -> None:
        self._path, self._faults, self._content, self._failed = Path(path), faults, b"", False
        self._reach("open_output_stream")

    def _reach(self, name: str, half: Callable[[], None] = lambda: None) -> None:
        try:
            self._faults.reach(name, half)
        except OSError:
            self._failed = True
            raise

    def _keep(self, content: bytes) -> None:
        self._content = content

    def write(self, content: Any) -> int:
        whole = self._content + bytes(content)
        self._reach("write", lambda: self._keep(whole[: len(whole) // 2]))
        self._keep(whole)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._reach("close")
            if self._failed:
                raise OSError("the upload has failed")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.with_suffix(".upload").write_bytes(self._content)
            self._path.with_suffix(".upload").replace(self._path)


class Bucket:
    """A filesystem that is not the disk's, as far as storage needs one. Its objects are files, for any process to look at."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.get_file_info = pafs.LocalFileSystem().get_file_info

    def open_output_stream(self, path: str, compression: None) -> Upload:
        assert compression is None
        return Upload(path, self._faults)


@contextmanager
def faulty(place: str, faults: Faults) -> Iterator[None]:
    """What is written meanwhile passes by the faults."""

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            faults.reach(name)
            result = function(*args, **options)
            return DiskStream(result, faults) if name in ("fdopen", "open") else result

        return call

    with pytest.MonkeyPatch.context() as patch:
        if place == "bucket":
            patch.setattr(storage, "filesystem", lambda path: (Bucket(faults), path))
        else:
            for module, name in [
                *((os, name) for name in ("makedirs", "fdopen", "fsync", "chmod", "replace")),
                (tempfile, "mkstemp"),
                (builtins, "open"),
            ]:
                patch.setattr(module, name, counted(name, getattr(module, name)))
        yield


def in_child(action: Callable[[], object]) -> int:
    """Runs in a forked process; its exit status: 0 when the action ends, 1 when it is killed, 2 when it raises."""
    child = os.fork()
    if not child:
        with suppress(BaseException):
            action()
            os._exit(0)
        os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def leftovers(folder: Path) -> list[str]:
    return [name for name in storage.list_files(str(folder)) if name.startswith(".writing-")]


Write = Callable[[Path], object]


def check_failures(root: Path, place: str, old: bytes | None, write: Write, whole: bytes) -> None:
    """Each call fails in its turn: the old content stays, nothing lies beside it, and a retry succeeds."""
    for nth in itertools.count(1):
        path, faults = prepare(root / str(nth), old), Faults(nth)
        with suppress(OSError), faulty(place, faults):
            write(path)
        if not faults.happened:
            assert faults.calls == CALLS[place]
            assert content(path) == whole
            return
        assert content(path) == old, faults.calls[nth - 1]
        assert not leftovers(path.parent), faults.calls[nth - 1]
        write(path)
        assert content(path) == whole


def check_kills(root: Path, place: str, old: bytes | None, write: Write, whole: bytes) -> None:
    """The process ends in each call in its turn: the old content stays; only what a sweep finds lies beside it."""
    left = 0
    for nth in itertools.count(1):
        path, faults = prepare(root / str(nth), old), Faults(nth, kill)
        with faulty(place, faults):
            status = in_child(lambda path=path: write(path))  # type: ignore[misc]
        assert status in (0, 1)
        if status == 0:
            break
        assert content(path) == old, nth
        left += len(leftovers(path.parent))
        storage.sweep(str(path.parent))
        assert os.listdir(path.parent) == ([path.name] if old else []) if path.parent.exists() else not old
        write(path)
        assert content(path) == whole
    assert nth == len(CALLS[place]) + 1
    assert bool(left) == (place == "disk")


def prepare(folder: Path, old: bytes | None) -> Path:
    folder.mkdir(parents=True)
    path = Path(shard_path(str(folder / "shards"), 0))
    if old:
        path.parent.mkdir()
        path.write_bytes(old)
    return path


def write_new(path: Path) -> None:
    storage.write_bytes(str(path), NEW)


def commit(path: Path) -> None:
    write_shard(path.parent)


@pytest.fixture
def shard(tmp_path: Path) -> bytes:
    """The content of the shard that `commit` makes."""
    path = prepare(tmp_path / "whole", None)
    commit(path)
    assert committed_units(str(path.parent)) == [0]
    assert len(read_shard(str(path)).texts) == 2
    return path.read_bytes()


both_places = pytest.mark.parametrize("place", ["disk", "bucket"])
either_old = pytest.mark.parametrize("old", [None, OLD], ids=["absent", "old"])
checks = pytest.mark.parametrize("check", [check_failures, check_kills])


@both_places
@either_old
@checks
def test_no_write_leaves_a_part(tmp_path: Path, place: str, old: bytes | None, check: Callable[..., None]) -> None:
    check(tmp_path, place, old, write_new, NEW)


@both_places
@checks
def test_no_commit_leaves_a_part_of_a_shard(tmp_path: Path, place: str, shard: bytes, check: Callable[..., None]) -> None:
    check(tmp_path, place, None, commit, shard)


@both_places
def test_a_shard_is_not_seen_before_its_last_call(tmp_path: Path, place: str) -> None:
    path = prepare(tmp_path / "x", None)
    seen: list[list[int]] = []
    faults = Faults()
    faults.reach = lambda name, half=None: seen.append(committed_units(str(path.parent)))  # type: ignore[method-assign, misc]
    with faulty(place, faults):
        commit(path)
    assert seen == [[]] * len(CALLS[place])
    assert committed_units(str(path.parent)) == [0]


def naive(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(content)


@either_old
@checks
def test_these_checks_see_a_write_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None, check: Callable[..., None]
) -> None:
    monkeypatch.setattr(storage, "write_bytes", naive)
    with pytest.raises(AssertionError, match="assert b'new content"):
        check(tmp_path, "disk", old, write_new, NEW)


def test_an_interrupted_upload_is_whole_or_absent(tmp_path: Path) -> None:
    """Interrupts reach only the main thread, at any moment; what an upload has at that moment must not become the object."""
    for nth in range(1, len(CALLS["bucket"]) + 1):
        path = prepare(tmp_path / str(nth), OLD)
        with pytest.raises(KeyboardInterrupt), faulty("bucket", Faults(nth, interrupt)):
            write_new(path)
        gc.collect()
        assert content(path) in (OLD, NEW), nth


def test_an_interrupt_just_after_the_rename_leaves_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.replace

    def rename_and_interrupt(*paths: str) -> None:
        rename(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", rename_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(str(tmp_path / "x"), NEW)
    assert os.listdir(tmp_path) == ["x"]
    assert content(tmp_path / "x") == NEW


@pytest.mark.parametrize("size", [0, 9, 10, 11, 100_000])
def test_what_waits_for_a_bucket_may_wait_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(storage, "filesystem", lambda path: (bucket, path))
    monkeypatch.setattr(storage, "SPOOL_BYTES", 10)
    with storage.writing("x") as stream:
        for start in range(0, size, 7):
            stream.write(NEW[start : min(start + 7, size)])
    assert content(tmp_path / "x") == NEW[:size]
