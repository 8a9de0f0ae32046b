"""Task files that were written in haste, by a machine or in malice: each is refused, in few words."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main

MARK = "FIELDS"
TASK = f"""\
name: t
teacher: none
instruction: Judge.
comments: {{max_tokens: 40}}
{MARK}
"""
BOMB = "a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
CHAIN = "a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}]\n" for i in range(3000))


def fields(text: str) -> str:
    """A task with these fields, of which the first line is line 5."""
    return TASK.replace(MARK, text)


def listed(values: str) -> str:
    return fields(f"fields:\n  kind:\n{values}")


FILES: dict[str, tuple[str | bytes, str]] = {
    # what YAML 1.1 takes for something else
    "yes among strings": (
        fields("fields:\n  intent: [translate, no, greet,\n           yes]"),
        r"line 6: field 'intent' lists `no`, which YAML reads as false beside the strings 'translate', 'greet': "
        r'write "no" in quotes for the string',
    ),
    "yes and no alone": (fields("fields: {urgent: [yes, no]}"), r'line 5: .*`yes`, which YAML reads as true: .*"yes"'),
    "on and off": (listed("  - On\n  - Off"), r'line 7: .*`On`.*"On"'),
    "an unquoted number among strings": (fields("fields: {stars: [none, 1, 2]}"), r'line 5: .*`1`.*"1"'),
    "an octal number": (fields("fields: {code: [010, 012]}"), r'`010`, which YAML reads as 8: .*"010"'),
    "a grouped number": (fields("fields: {n: [1_000, 2]}"), r'`1_000`, which YAML reads as 1000: .*"1_000"'),
    "a time of day": (fields("fields: {at: [12:30, 14:00]}"), r'`12:30`, which YAML reads as 750: .*"12:30"'),
    "a number that is a string": (fields("fields: {n: [1e3, 2e3]}"), r'`1e3`, which YAML reads as "1e3".*1000\.0'),
    "a date": (fields("fields: {day: [2024-02-29, never]}"), r'line 5: YAML reads `2024-02-29` as a date: .*"2024-02-29"'),
    "an impossible date": (fields("fields: {day: [2024-02-31, never]}"), r"line 5: .*`2024-02-31`"),
    "a tilde": (fields("fields: {kind: [good, ~]}"), r"`~`, which YAML reads as null"),
    "an empty item": (listed("  - good\n  -\n"), r"line 8: .*an empty value"),
    "an equals sign": (fields("fields: {sign: [<, =]}"), r'line 5: .*`=`.*"="'),
    "a field named yes": (fields("fields: {yes: [a, b]}"), r'line 5: .*key `yes`.*"yes"'),
    "a field named 2024": (fields("fields:\n  2024: [a, b]"), r'line 6: .*key `2024`.*"2024"'),
    "a field without a name": (fields("fields: {~: [a, b]}"), r"line 5: .*key `~`"),
    "a list as a key": (fields("fields:\n  ? [a]\n  : [b]"), r"line 6: .*key"),
    "a mapping as a key": (fields("fields: {{a: b}: [b]}"), r"line 5: .*key"),
    # what grows, nests or never ends
    "an alias bomb": (fields(BOMB + "fields: {kind: *a9}"), "more than 40,000"),
    "a chain of aliases": (fields(CHAIN + "fields: {kind: *a3000}"), "deep"),
    "an alias inside of itself": (fields("fields: &f {kind: [a, *f]}"), "deep"),
    "an unknown alias": (fields("fields: {kind: *nowhere}"), "line 5: .*nowhere"),
    "5,000 nested lists": (fields("fields: {kind: " + "[" * 5000 + "]" * 5000 + "}"), "line 5: .*deep"),
    "5,000 nested items": (listed("  " + "- " * 5000 + "x"), "line 7: .*deep"),
    "30,000 fields": (fields("fields:\n" + "".join(f"  f{i}: [a, b]\n" for i in range(30_000))), "more than 40,000"),
    "100,000 values": (fields("fields: {kind: [" + ", ".join(f"v{i}" for i in range(100_000)) + "]}"), "more than 40,000"),
    "20,000 values": (
        fields("fields: {kind: [" + ", ".join(f"v{i}" for i in range(20_000)) + "]}"),
        "20,000 values, more than 10,000",
    ),
    "a value of 1 MB": (fields("fields: {kind: [a, " + "x" * 1_000_000 + "]}"), "characters as JSON, more than"),
    "a name of 1 MB": (fields("fields:\n  ? " + "x" * 1_000_000 + "\n  : {type: string}"), "'xxx.*not finite"),
    "a file of 5 MB": (fields("# " + "x" * 5_000_000 + "\nfields: {kind: [a, b]}"), "MiB"),
    "an integer of 5,000 digits": (fields("fields: {n: [1, " + "1" * 5000 + "]}"), "line 5: .*`1111"),
    "an integer of 5,000 hexadecimal digits": (fields("fields: {n: [1, 0x" + "1" * 5000 + "]}"), "line 5: .*`0x1111"),
    "a float without end": (fields("fields: {n: [1, 1" + ":1" * 2000 + ".5]}"), "line 5: .*`1:1"),
    "10^30 answers": (fields("fields:\n" + "".join(f"  f{i}: [" + ", ".join("abcdefghij") + "]\n" for i in range(30))), ""),
    "infinity": (fields("fields: {n: [1, .inf]}"), "'n'.*inf"),
    "not a number": (fields("fields: {n: [.nan]}"), "'n'.*nan"),
    # what is no text, no YAML, or no task
    "empty": ("", "must hold a YAML mapping"),
    "a comment alone": ("# nothing\n", "must hold a YAML mapping"),
    "a list": ("- a\n- b\n", "must hold a YAML mapping, found a list"),
    "two documents": (fields("fields: {kind: [a, b]}") + "---\na: 1\n", "line 6: .*document"),
    "a NUL byte": (b"name: \0\n", "not YAML"),
    "UTF-16": (fields("fields: {kind: [a, b]}").encode("utf-16"), "not UTF-8"),
    "Latin-1": (fields("fields: {kind: [café, b]}").encode("latin-1"), "not UTF-8"),
    "random bytes": (bytes(range(256)) * 50, "not UTF-8"),
    "tabs for spaces": (fields("fields:\n\tkind: [a, b]"), "line 6: "),
    "half a character": (fields('fields: {kind: [a, "\\ud83d"]}'), r"line 5: .*\\ud83d"),
    "no character": (fields('fields: {kind: [a, "\\UFFFFFFFF"]}'), "line 5"),
    "a Python object": (fields("fields: !!python/object/apply:os.system [touch pwned]"), "line 5: .*tag"),
    "a set": (fields("fields: {kind: !!set {a, b}}"), "line 5: .*tag"),
    "binary": (fields("fields: {kind: [!!binary aGk=, b]}"), "line 5: .*tag"),
    "a boolean that is none": (fields("fields: {kind: [!!bool x, b]}"), "line 5: .*tag"),
    "a long tag": (fields("fields: !" + "x" * 100_000 + " {kind: [a, b]}"), "line 5: .*tag"),
    "a merge": (fields("fields: {<<: {kind: [a, b]}}"), "line 5: .*key `<<`"),
    "a version of 5,000 digits": ("%YAML 1." + "1" * 5000 + "\n---\na: 1\n", "line 1"),
    "a key twice": (fields("fields: {kind: [a], kind: [b]}"), "line 5: kind written twice in one mapping"),
    "5,000 unknown keys": (fields("".join(f"k{i}: 1\n" for i in range(5000)) + "fields: {kind: [a]}"), "unknown key.*more"),
}
"""Content, and what the refusal says. An empty pattern: the task itself is allowed."""


def write(folder: Path, content: str | bytes) -> str:
    path = folder / "task.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_task_file_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    content, reason = FILES[name]
    path = write(tmp_path, content)
    done = CliRunner().invoke(main, ["plan", "--task", path, "--out", str(tmp_path / "out")])
    if not reason:
        assert done.exit_code == 0
        return
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert path in done.output
    assert re.search(reason, done.output, re.DOTALL)
    assert len(done.output) < 3000
    assert max(map(len, done.output.splitlines())) < 500
    assert not os.path.exists("pwned")
