"""Bad input gets a clear error and a non-zero exit before any engine starts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Retort
from tests.tiny import save_teacher

GOOD_TASK = """
name: tiny
teacher: none
instruction: Judge.
fields: {mood: [good, bad, mixed], loud: {type: boolean}}
comments: {max_tokens: 40}
context: 90
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    save_teacher(folder / "teacher", seed=0)
    (folder / "task.yaml").write_text(GOOD_TASK)
    (folder / "comments.jsonl").write_text('{"id": 1, "body": "a comment"}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "no-text.csv").write_text("id,words\n1,hello\n")
    (folder / "not-a-model").mkdir()
    (folder / "text.txt").write_text("hello")
    return folder


def arguments(place: Path, **changes: str) -> list[str]:
    named = {"task": "task.yaml", "teacher": "teacher", "comments": "comments.jsonl", "out": "out"} | changes
    return [f"--{name}={place / value}" for name, value in named.items()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "missing.yaml"}, "no file at"),
        ({"comments": "missing.jsonl"}, "no file at"),
        ({"comments": "text.txt"}, "comments are read from .jsonl"),
        ({"teacher": "not-a-model"}, "is not a model"),
        ({"teacher": "nowhere/at/all"}, "is not a model"),
    ],
)
def test_missing_and_wrong_files(retort: Retort, place: Path, changes: dict[str, str], message: str) -> None:
    started = time.monotonic()
    assert message in retort.refuses("extract", *arguments(place, **changes))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{type: boolean}", "{type: string}", "field 'loud' is not finite"),
        ("[good, bad, mixed]", "[good, bad, good]", 'lists "good" twice'),
        ("instruction:", "instructions:", "instructions: unknown key"),
        ("context: 90", "context: 20", "context 20 is too short"),
        ("max_tokens: 40", "max_tokens: 400", "context 90 is too short"),
    ],
)
def test_wrong_tasks(retort: Retort, place: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "task.yaml").write_text(GOOD_TASK.replace(old, new))
    options = [a for a in arguments(place) if not a.startswith("--task")]
    assert message in retort.refuses("extract", f"--task={tmp_path / 'task.yaml'}", *options)


def test_unknown_configuration_keys_are_named(retort: Retort, place: Path) -> None:
    assert "student.depth: unknown key" in retort.refuses("extract", *arguments(place), "--set=student.depth=3")


def test_an_impossible_student_is_refused_before_the_extraction(retort: Retort, place: Path) -> None:
    output = retort.refuses("run", *arguments(place), "--set=student.width=1000")
    assert "width 1000 must be a multiple of 2 × heads (8)" in output


def test_a_run_without_the_logits_of_forced_steps_is_refused_before_the_extraction(retort: Retort, place: Path) -> None:
    wanted = ("--set=extract.capture=choices", "--set=student.sequence=full", "--set=student.width=64")
    output = retort.refuses("run", *arguments(place), *wanted)
    assert "set student.sequence=choices, or extract.capture=all" in output


@pytest.mark.parametrize(("comments", "message"), [("empty.jsonl", "is empty"), ("no-text.csv", "no column 'body'")])
def test_inputs_without_comments(retort: Retort, place: Path, comments: str, message: str) -> None:
    assert message in retort.refuses("extract", *arguments(place, comments=comments))


@pytest.mark.slow
def test_a_teacher_not_at_home_in_the_format_is_stopped_by_calibration(retort: Retort, place: Path) -> None:
    (place / "many.jsonl").write_text("".join(json.dumps({"body": f"comment {i}"}) + "\n" for i in range(40)))
    output = retort("extract", *arguments(place, comments="many.jsonl", out="out-calibration"), ok=False)
    assert "the teacher is not at home in the task's format" in output
    assert "extract.calibration_floor" in output
    assert not (place / "out-calibration/shards").exists()


@pytest.mark.slow
def test_comments_that_all_fail_the_filters(retort: Retort, place: Path) -> None:
    (place / "links.jsonl").write_text('{"body": "see https://example.org"}\nnot json\n')
    output = retort("extract", *arguments(place, comments="links.jsonl", out="out-links"), ok=False)
    assert "no comment passed the filters: 2 rows read, 0 kept, 1 malformed, dropped: 1 urls" in output


def test_stages_without_the_one_before(retort: Retort, tmp_path: Path) -> None:
    assert "Run `retort extract` first" in retort.refuses("train", f"--out={tmp_path}")
    assert "no student in" in retort.refuses("evaluate", f"--out={tmp_path}")
    (tmp_path / "c.jsonl").write_text("{}\n")
    assert "no student in" in retort.refuses("predict", f"--out={tmp_path}", f"--comments={tmp_path / 'c.jsonl'}")
