"""Files on a disk or in a bucket, by path or URI, through pyarrow's filesystems. Everything is written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import DTypeLike, NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from pipeline.base.errors import UserError, clip

SPOOL_BYTES = 64 << 20  # what waits for a bucket is kept in memory up to this size, on disk beyond
SAMPLES, SAMPLE_BYTES = 16, 64 << 10  # what a fingerprint reads of a file
UNFINISHED = ".writing-"  # starts the name of a file on a disk until it is whole
FINDINGS = 3  # of what is wrong with a file, named in one message

Form = TypeVar("Form")


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a local path or a URI (`s3://…`, `gs://…`), and the path within it.

    Raises:
        UserError: the URI's scheme is unknown, or it holds credentials or a NUL.
    """
    if "\0" in path:
        raise UserError(f"{path!r} is no path: it holds a NUL")
    if not is_uri(path):
        return pafs.LocalFileSystem(), os.path.abspath(path)
    refuse_credentials(path)
    try:
        return pafs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot open {path}: {error}") from error


def refuse_credentials(uri: str) -> None:
    """Paths stand in logs, manifests and MLflow, where credentials would be read by anyone.

    Raises:
        UserError: the URI has a user or a password before its host, as in `s3://key:secret@bucket`.
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        raise UserError(
            f"the URI {bare} was given with credentials, which would stand in logs: leave them out, and give machines a role, "
            "or the variables that AWS, Google and MLflow read (AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_PASSWORD, …)"
        )


def is_uri(path: str) -> bool:
    """Whether a path names a place by scheme, as `s3://bucket/key` does."""
    return re.match(r"^[a-z][a-z0-9+.-]*://", path) is not None


def join(folder: str, *parts: str) -> str:
    """A path below a folder or a URI."""
    return "/".join([folder.rstrip("/"), *parts])


def absolute(path: str) -> str:
    """A path that means the same in any process on this machine; URIs stay as they are."""
    return path if is_uri(path) else os.path.abspath(path)


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    fs, inner = filesystem(path)
    return bool(fs.get_file_info(inner).type != pafs.FileType.NotFound)


def size(path: str) -> int:
    """A file's bytes."""
    fs, inner = filesystem(path)
    return int(fs.get_file_info(inner).size)


def regular_file(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a file's path or URI, and the path within it.

    Raises:
        UserError: there is no such file, or it is none to read: a FIFO or a device may never end.
    """
    fs, inner = filesystem(path)
    info = fs.get_file_info(inner)
    if not info.is_file:
        other = "" if info.type == pafs.FileType.NotFound else ": what is there is a folder, a FIFO or a device"
        raise UserError(f"no file at {path}{other}")
    return fs, inner


def list_files(folder: str) -> list[str]:
    """Names of the files directly in a folder, sorted; none where there is no folder."""
    fs, inner = filesystem(folder)
    infos = fs.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.is_file)


def expand(pattern: str) -> list[str]:
    """The files a path, folder or glob names, sorted.

    Raises:
        UserError: it names none.
    """
    if is_uri(pattern):
        found = _expand_uri(pattern)
    elif os.path.isdir(pattern):
        found = [join(pattern, name) for name in list_files(pattern)]
    else:
        found = [pattern] if os.path.isfile(pattern) else [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    if not found:
        raise UserError(f"no file at {pattern}")
    return sorted(found)


def _expand_uri(uri: str) -> list[str]:
    fs, inner = filesystem(uri)
    if not any(mark in inner for mark in "*?["):
        info = fs.get_file_info(inner)
        if info.is_file:
            return [uri]
        names = list_files(uri) if info.type == pafs.FileType.Directory else []
        return [_beside(uri, inner, join(inner, name)) for name in names]
    root = re.split(r"[*?\[]", inner)[0].rsplit("/", 1)[0]
    wanted = re.compile(glob.translate(inner, recursive=True) if hasattr(glob, "translate") else _glob_regex(inner))
    infos = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    return [_beside(uri, inner, info.path) for info in infos if info.is_file and wanted.match(info.path)]


def _beside(uri: str, inner: str, path: str) -> str:
    """The URI of another path in the same filesystem: all that stands around the path within it stays."""
    address, mark, query = uri.partition("?")
    address, inner = unquote(address).rstrip("/"), inner.rstrip("/")
    if not address.endswith(inner):
        raise UserError(f"cannot list {uri}: name each file by itself")
    return address.removesuffix(inner) + quote(path) + mark + query


def _glob_regex(pattern: str) -> str:
    """`glob.translate` for Python 3.11 and 3.12: `**` crosses folders, `*` and `?` do not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    marks = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(marks.get(p) or (p if p.startswith("[") else re.escape(p)) for p in parts) + r"\Z"


def read_bytes(path: str) -> bytes:
    """A file's content.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    fs, inner = regular_file(path)
    with _no_fault(path), fs.open_input_stream(inner, compression=None) as stream:
        return bytes(stream.read())


def read_text(path: str) -> str:
    """A text file's content, in UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: str) -> Any:
    """A JSON file's content."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def read_form(path: str, form: type[Form]) -> Form:
    """A JSON file's content in a form that pydantic knows, such as a model or a dataclass.

    Raises:
        UserError: there is no such file, or its content has another form; the message names the keys.
    """
    return in_form(path, read_json(path), form)


def in_form(path: str, content: Any, form: type[Form]) -> Form:
    """What was read from a file, in a form that pydantic knows.

    Raises:
        UserError: it has another form.
    """
    try:
        return TypeAdapter(form).validate_python(content)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, finding['loc']))}: {finding['msg']}".lstrip(": ") for finding in error.errors()]
        more = f" and {len(found) - FINDINGS} more" if len(found) > FINDINGS else ""
        raise UserError(f"{path} is damaged, or not as Retort writes it: {'; '.join(found[:FINDINGS])}{more}") from error


def read_tensors(path: str, form: dict[str, tuple[DTypeLike, int]]) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file.

    Raises:
        UserError: there is no such file, it is damaged, or it holds other arrays.
    """
    try:
        found = load_tensors(read_bytes(path))
    except (SafetensorError, KeyError, ValueError) as error:  # the latter two for dtypes and sizes that numpy does not have
        raise UserError(f"{path} is damaged, or not a safetensors file: {clip(str(error), 300)}") from error
    if {name: (array.dtype, array.ndim) for name, array in found.items()} != form:
        wanted = ", ".join(f"{name} ({dimensions}-dimensional {np.dtype(dtype)})" for name, (dtype, dimensions) in form.items())
        raise UserError(f"{path} is damaged, or another file: it must hold {wanted}")
    return found


class RawFile(io.RawIOBase):
    """A file's bytes as they are stored. They may be read front to back, or anywhere where `seekable` says so.

    What decompresses or parses them raises the same exceptions for a broken file as a disk or a network does for a fault of
    its own. Here faults become `UserError`, which passes through pyarrow as it is, so that neither is taken for the other.
    """

    def __init__(self, path: str, seekable: bool = False) -> None:
        self._path, self._seekable = path, seekable
        fs, inner = filesystem(path)
        with _no_fault(path):
            self._stream = fs.open_input_file(inner) if seekable else fs.open_input_stream(inner, compression=None)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """As asked for."""
        return self._seekable

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, less at the end of the file."""
        with _no_fault(self._path):
            return int(self._stream.readinto(buffer))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place in the file."""
        with _no_fault(self._path):
            return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        """The place in the file."""
        return int(self._stream.tell())


@contextmanager
def _no_fault(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {path}: {clip(str(error), 300)}. Once it can be read, the same command goes on from there"
        ) from error


def fingerprint(path: str) -> str:
    """Identity of a file's content: its size and 16 blocks spread over it, or all of a file of at most 1 MiB.

    A change of a large file that keeps its size and lies between the blocks is not seen.

    Raises:
        UserError: the file cannot be read.
    """
    fs, inner = regular_file(path)
    with _no_fault(path), fs.open_input_file(inner) as stream:
        size = stream.size()
        digest = hashlib.sha256(f"{size}:".encode())
        for start in _sample_starts(size):
            digest.update(stream.read_at(SAMPLE_BYTES, start))
    return digest.hexdigest()[:16]


def _sample_starts(size: int) -> list[int]:
    if size <= SAMPLES * SAMPLE_BYTES:
        return list(range(0, size, SAMPLE_BYTES))
    return [i * (size - SAMPLE_BYTES) // (SAMPLES - 1) for i in range(SAMPLES)]


@contextmanager
def writing(path: str) -> Iterator[IO[bytes]]:
    """A stream whose content appears at the path as a whole when the block ends, and not at all if it fails.

    On a disk it is written under another name first; for a bucket it is kept aside and put there at the end.
    """
    fs, inner = filesystem(path)
    with _on_disk(inner) if isinstance(fs, pafs.LocalFileSystem) else _in_bucket(fs, inner) as stream:
        yield stream


@contextmanager
def _on_disk(path: str) -> Iterator[IO[bytes]]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):  # an interrupt may come when it already has its name
            os.unlink(temporary)
        raise


@contextmanager
def _in_bucket(fs: pafs.FileSystem, path: str) -> Iterator[IO[bytes]]:
    """A stream to a bucket completes its upload whenever it is closed, even by a failure or when it is forgotten.

    So it is opened when all is there, takes all in one call, and does so in a thread, where no interrupt is raised.
    """
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        yield spool
        size = spool.seek(0, os.SEEK_END)
        spool.seek(0)
        content = spool.read() if size <= SPOOL_BYTES else mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_put, fs, path, content).result()


def _put(fs: pafs.FileSystem, path: str, content: bytes | mmap.mmap) -> None:
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(content)


def sweep(folder: str) -> None:
    """Deletes what killed writes left in a folder on a disk; in a bucket they leave no file.

    To be called only while no process writes to the folder: what is being written there would go too.
    """
    fs, inner = filesystem(folder)
    if isinstance(fs, pafs.LocalFileSystem):
        for name in list_files(folder):
            if name.startswith(UNFINISHED):
                os.unlink(os.path.join(inner, name))


def delete(path: str) -> None:
    """Deletes a file, or a folder with all it holds, where there is one."""
    fs, inner = filesystem(path)
    kind = fs.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(inner)
    elif kind == pafs.FileType.File:
        fs.delete_file(inner)


def write_bytes(path: str, content: bytes | memoryview) -> None:
    """Writes a file whole."""
    with writing(path) as stream:
        stream.write(content)


def write_text(path: str, content: str) -> None:
    """Writes a text file whole, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str, content: Any) -> None:
    """Writes indented JSON whole."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
