"""Files on a disk or in a bucket, by path or URI, through pyarrow's filesystems. Everything is written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import quote, unquote

import pyarrow.fs as pafs

from pipeline.errors import UserError

SPOOL_BYTES = 64 << 20  # what waits for a bucket is kept in memory up to this size, on disk beyond


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a local path or a URI (`s3://…`, `gs://…`), and the path within it.

    Raises:
        UserError: the URI's scheme is unknown.
    """
    if not is_uri(path):
        return pafs.LocalFileSystem(), os.path.abspath(path)
    try:
        return pafs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot open {path}: {error}") from error


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
        UserError: there is no such file.
    """
    fs, inner = filesystem(path)
    if not fs.get_file_info(inner).is_file:
        raise UserError(f"no file at {path}")
    with fs.open_input_stream(inner, compression=None) as stream:
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
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


@contextmanager
def writing(path: str) -> Iterator[IO[bytes]]:
    """A stream whose content appears at the path as a whole when the block ends, and not at all if it fails.

    On a disk it is written under another name first; for a bucket it is kept aside and put there at the end.
    """
    fs, inner = filesystem(path)
    if not isinstance(fs, pafs.LocalFileSystem):
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            yield spool
            spool.seek(0)  # only now, as a stream to a bucket completes its upload even when a failure closes it
            with fs.open_output_stream(inner, compression=None) as target:
                shutil.copyfileobj(spool, target)
        return
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(inner), prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, inner)
    except BaseException:
        os.unlink(temporary)
        raise


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
