"""Ways to damage a folder of files, and what the `retort` command must then say: one line, naming the file."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from safetensors.numpy import load, save

from pipeline.cli.main import main

Damage = Callable[[Path], None]
Case = tuple[str, Damage]  # the file's name, and what happens to it


def retort(*arguments: str) -> tuple[int, str]:
    """The command's exit status and what it printed, in this process; a traceback would be raised here."""
    done = CliRunner().invoke(main, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def assert_one_line(status: int, said: str, named: str) -> None:
    """A user's error that names a file."""
    assert status == 1, said
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    assert named in said, said
    assert len(said) < 1000, said


def refused(status: int, said: str, name: str) -> bool:
    """Whether the command refused a file with any damage: it works, or one line says why not."""
    if status == 0:
        return False
    if name != "task.yaml":  # of which each wrong key has a line
        assert_one_line(status, said, "")
    return True


def write(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content) and None


def shorten(share: float) -> Damage:
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def remove(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    """Reading it would wait for a writer for ever."""
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    """Reading it would never end."""
    path.unlink()
    path.symlink_to("/dev/zero")


def in_json(**changes: Any) -> Damage:
    """Keys of a JSON object set; to ... removed."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return damage


def in_tensors(**changes: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None) -> Damage:
    """Arrays of a safetensors file changed, `__` in a name for a dot; with None left out."""

    def damage(path: Path) -> None:
        tensors = load(path.read_bytes())
        for name, change in changes.items():
            before = tensors.pop(name.replace("__", "."), np.zeros(1, np.float32))
            if change is not None:
                tensors[name.replace("__", ".")] = np.ascontiguousarray(change(before))
        path.write_bytes(save(tensors))

    return damage


def filled(value: float) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    return lambda array: np.full_like(array, value)


def holed(value: float) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """One number changed, the last."""

    def change(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        other = array.copy()
        other.flat[-1] = value
        return other

    return change


def header(content: Any) -> bytes:
    """A safetensors file of a header alone."""
    encoded = json.dumps(content).encode()
    return struct.pack("<Q", len(encoded)) + encoded


def flip(path: Path, rng: random.Random) -> None:
    """A file cut short, or with a few bytes changed."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.2:
        del content[rng.randrange(len(content)) :]
    else:
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)
