from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.base.yaml_files import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.one_of(text, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


def refusal(content: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_yaml(content, "here")
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(value=values)
@example(value={"yes": "no", "=": "<<", "2024-01-01": "1e3", "012": ["~", "", "null"]})
def test_what_json_can_say_is_read_back(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value), "here") == value


@given(content=st.one_of(st.text(max_size=60), st.text("[]{}:,-&*!?|>'\"%@\n\t #ab01.~<=\\U", max_size=40)))
def test_any_text_is_read_or_refused(content: str) -> None:
    with suppress(UserError):
        parse_yaml(content, "here")


def test_an_alias_says_again_what_was_said() -> None:
    assert parse_yaml("{a: &levels [low, high], b: *levels}", "here") == {"a": ["low", "high"], "b": ["low", "high"]}


def test_what_aliases_repeat_counts() -> None:
    level = "[" + ", ".join(["x"] * 999) + "]"
    read = parse_yaml("{a: &level " + level + ", b: [" + ", ".join(["*level"] * 35) + "]}", "here")
    assert len(read["b"]) == 35
    assert "more than 40,000 keys and values" in refusal("{a: &level " + level + ", b: [" + ", ".join(["*level"] * 45) + "]}")


@pytest.mark.parametrize(("mark", "end"), [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")])
def test_nesting_ends_somewhere(mark: str, end: str) -> None:
    if mark != "? ":
        parse_yaml(mark * MAX_DEPTH + "x" + end * MAX_DEPTH, "here")
    assert "deeper than 40 levels" in refusal(mark * 5000 + "x" + end * 5000)


def test_reading_stops_at_the_bound() -> None:
    started = time.process_time()
    assert "line 2: more than 40,000 keys and values" in refusal("a:\n  [" + "x, " * 300_000 + "]")
    assert time.process_time() - started < 6


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a:\n  no: 1", 'here, line 2: the key `no` is no string to YAML: write "no" in quotes'),
        ("a: 1\n? [b]\n: 2", "here, line 2: the key is no string to YAML"),
        ("a: {<<: {b: 1}}", "here, line 1: the key `<<` is no string to YAML"),
        ("\na: 2024-02-31", 'here, line 2: YAML reads `2024-02-31` as a date: write "2024-02-31" in quotes'),
        ("a: !!set {b, c}", "here, line 1: tags such as tag:yaml.org,2002:set are not read"),
        ("a: !!python/name:os.system", "are not read"),
        ("a: 0b" + "1" * 20_000, "here, line 1: `0b1111"),
        ('a: "\\udc80"', "half a character"),
        ("a: b: c", "here is not YAML, line 1: mapping values are not allowed here"),
        ("a: *b", "here is not YAML, line 1: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2", "here is not YAML, line 2: expected a single document"),
    ],
)
def test_a_fault_is_told_with_its_line(content: str, told: str) -> None:
    assert told in refusal(content)


def test_infinity_is_left_to_the_setting_that_takes_it() -> None:
    assert parse_yaml("-.inf", "here") == -math.inf


def test_a_file_is_measured_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: it takes no space on the disk
    with pytest.raises(UserError, match=r"large\.yaml is larger than 2 MiB"):
        read_yaml(str(path))
    path.write_bytes(b"a: 1 #" + b"x" * (MAX_BYTES - 6))
    assert read_yaml(str(path)) == {"a": 1}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "absent", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"no file at {path}"):
            read_yaml(str(path))


@pytest.mark.parametrize("start", ["\ufeff", "%YAML 1.2\n---\n", "# a remark\n\n"])
def test_a_mark_before_the_content_is_no_fault(tmp_path: Path, start: str) -> None:
    (tmp_path / "a.yaml").write_text(f"{start}a: 1\n", encoding="utf-8")
    assert read_yaml(str(tmp_path / "a.yaml")) == {"a": 1}
