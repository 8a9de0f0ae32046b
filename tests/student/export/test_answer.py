from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import UserError
from student.export.answer import RefusedError, load
from student.export.folder import ExportedStudent, numbered_answers, write_folder
from student.export.measure import by_folder, by_pytorch
from tests.student.export.conftest import REFUSED, TEXTS, kept

SPECIAL = "text of <end_of_turn> and <bos> as text"


@pytest.fixture
def folder(source: ExportedStudent, tmp_path: Path) -> Path:
    write_folder(str(tmp_path), source)
    return tmp_path


def test_it_answers_as_retort_does(source: ExportedStudent, folder: Path) -> None:
    rows = kept(source, TEXTS)
    expected, student = by_pytorch(source, rows), load(folder)
    found = [student.answer(f" {text}\n") for text in TEXTS]
    assert [source.compiled.task.fit(answer["answer"]) for answer in found] == expected.values
    assert len(set(expected.values)) > 2
    assert [answer["confidence"] for answer in found] == pytest.approx(expected.confidence, abs=2e-5)
    assert found[0]["answer"].keys() | set(source.compiled.task.optional) == source.compiled.task.fields.keys()


@pytest.mark.parametrize("text", REFUSED)
def test_it_refuses_what_the_filters_set_aside(source: ExportedStudent, folder: Path, text: str) -> None:
    assert kept(source, [text])[0].set_aside == REFUSED[text]
    with pytest.raises(RefusedError, match=REFUSED[text]):
        load(folder).answer(text)


def test_the_text_of_control_tokens_is_text_where_the_task_lets_it_through(source: ExportedStudent, tmp_path: Path) -> None:
    rules = {"max_tokens": 40, "special_tokens": True, "urls": True}
    task = source.compiled.task.model_copy(update={"comments": type(source.compiled.task.comments)(**rules)})
    lenient = ExportedStudent(source.model, type(source.compiled)(task, *list(vars(source.compiled).values())[1:]), None)
    write_folder(str(tmp_path), lenient)
    texts = [SPECIAL, "https://x.y", *TEXTS[:10]]
    rows = kept(lenient, texts)
    assert not any(row.set_aside for row in rows)
    found = [load(tmp_path).answer(text)["answer"] for text in texts]
    assert [task.fit(answer) for answer in found] == by_pytorch(lenient, rows).values


def test_every_answer_has_a_number(source: ExportedStudent, folder: Path) -> None:
    answers = numbered_answers(source)
    assert json.loads((folder / "answers.json").read_text()) == answers
    assert sorted(map(json.dumps, answers)) == sorted(map(source.compiled.task.render, source.compiled.task.answers()))


def test_a_process_without_retort(plain: ExportedStudent, tmp_path: Path) -> None:
    write_folder(str(tmp_path), plain)
    rows = kept(plain, TEXTS[:5])
    found = by_folder(str(tmp_path), [*TEXTS[:5], "long " * 60], plain.compiled.task)
    assert found.values == [*by_pytorch(plain, rows).values, None]
    np.testing.assert_allclose(found.confidence[:5], by_pytorch(plain, rows).confidence, atol=2e-5)
    assert found.confidence[5] == 0
    (tmp_path / "student" / "model" / "shape.py").write_text("import pipeline")
    with pytest.raises(UserError, match="import of pipeline halted"):
        by_folder(str(tmp_path), TEXTS[:1], plain.compiled.task)


def test_the_script(plain: ExportedStudent, tmp_path: Path) -> None:
    write_folder(str(tmp_path / "export"), plain)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(tmp_path / "export" / "answer.py")]
    run = {"capture_output": True, "text": True, "check": True, "env": environment, "cwd": tmp_path}
    values = [dict(zip(plain.compiled.task.fields, v, strict=True)) for v in by_pytorch(plain, kept(plain, TEXTS[:2])).values]
    for ended in (
        subprocess.run([*command, *TEXTS[:2], ""], **run),
        subprocess.run(command, input="\n".join([*TEXTS[:2], "\n"]), **run),
    ):
        lines = [json.loads(line) for line in ended.stdout.splitlines()]
        assert [line["answer"] for line in lines[:2]] == values
        assert lines[2] == {"answer": None, "reason": "too_short"}
