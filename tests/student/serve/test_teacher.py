from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.config import TeacherConfig
from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Scalar
from pipeline.teacher.process import EngineError
from student.predict.teacher import FallbackTeacher
from student.serve.taught import KeptTeacher
from tests.student.serve.conftest import FakeAnswerer, Serve
from tests.tiny import save_teacher, tiny_tokenizer

SAD = {"mood": "mixed", "loud": False}


class FakeTeacher:
    """Finds everything mixed, at its gate; fails on "poison"."""

    def __init__(self) -> None:
        self.name, self.state, self.gate, self.asked = "a teacher", "ready", threading.Event(), list[list[str]]()
        self.gate.set()

    def answer(self, texts: list[str]) -> list[dict[str, Scalar] | None]:
        self.asked.append(texts)
        self.gate.wait(20)
        if "poison" in texts:
            raise EngineError("the engine died")
        return [None if text == "unaskable" else dict(SAD) for text in texts]

    def close(self) -> None:
        self.gate.set()


@pytest.fixture
def teacher() -> FakeTeacher:
    return FakeTeacher()


def test_the_teacher_is_asked_beside_the_student(serve: Serve, fake: FakeAnswerer, teacher: FakeTeacher):
    with serve(fake, teacher) as client:
        sure, aside = client.post("/classify", json={"texts": ["fine", ""], "teacher": True}).json()["results"]
        assert client.get("/task").json()["teacher"] == {"model": "a teacher", "state": "ready"}
        client.post("/classify", json={"text": "fine"})
    assert (sure["answer"]["mood"], sure["teacher"], sure["source"]) == ("good", SAD, "student")
    assert (aside["teacher"], aside["reason"]) == (None, "too_short")
    assert teacher.asked == [["fine"]]


def test_unsure_answers_are_the_teachers(serve: Serve, compiled: CompiledTask, teacher: FakeTeacher):
    settings = {"fallback": 0.6}
    with serve(FakeAnswerer(compiled, confidence=0.59), teacher, **settings) as client:
        taught, untaught = client.post("/classify", json={"texts": ["bad", "unaskable"]}).json()["results"]
        chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "bad"}]}).json()
        metrics = client.get("/metrics").text
    assert (taught["answer"], taught["source"], taught["confidence"]) == (SAD, "teacher", 0.59)
    assert (untaught["answer"]["mood"], untaught["source"]) == ("good", "student")
    assert (chat["choices"][0]["message"]["content"], chat["model"]) == (compiled.task.render(("mixed", False)), "a teacher")
    assert 'retort_fallbacks_total{source="teacher"} 2.0' in metrics
    assert 'retort_fallbacks_total{source="student"} 1.0' in metrics


def test_sure_answers_are_the_students(serve: Serve, fake: FakeAnswerer, teacher: FakeTeacher):
    with serve(fake, teacher, fallback=0.9) as client:
        (result,) = client.post("/classify", json={"text": "bad"}).json()["results"]
    assert (result["source"], teacher.asked) == ("student", [])


@pytest.mark.parametrize("trouble", ["fails", "is late", "is not there yet"])
def test_the_students_answer_stands_when_the_teacher(serve: Serve, compiled: CompiledTask, teacher: FakeTeacher, trouble: str):
    text = "poison" if trouble == "fails" else "fine"
    if trouble == "is late":
        teacher.gate.clear()
    if trouble == "is not there yet":
        teacher.state = "starting"
    student = FakeAnswerer(compiled, confidence=0.1)
    student.answer = lambda rows, value_probabilities=False: [student._answer(row.text, value_probabilities) for row in rows]  # type: ignore[method-assign]
    with serve(student, teacher, fallback=0.6, timeout_seconds=0.5) as client:
        (result,) = client.post("/classify", json={"text": text}).json()["results"]
        assert (result["source"], result["answer"]["mood"]) == ("student", "good")
        assert 'retort_fallbacks_total{source="student"} 1.0' in client.get("/metrics").text


def test_a_slow_teacher_does_not_delay_the_student(serve: Serve, fake: FakeAnswerer, teacher: FakeTeacher):
    with serve(fake, teacher) as client:
        teacher.gate.clear()
        waiting = threading.Thread(target=client.post, args=["/classify"], kwargs={"json": {"text": "fine", "teacher": True}})
        waiting.start()
        while not teacher.asked:
            time.sleep(0.005)
        assert client.post("/classify", json={"text": "fine"}).status_code == 200
        assert waiting.is_alive()
        teacher.gate.set()
        waiting.join()


@pytest.fixture(scope="module")
def real(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FallbackTeacher]:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder, seed=0)
    teacher = FallbackTeacher(str(folder), TeacherConfig(engine="transformers", threads=1), compiled)
    yield teacher
    teacher.close()


@pytest.mark.slow
def test_a_real_teacher_answers_is_kept_and_comes_back_when_it_died(
    real: FallbackTeacher, compiled: CompiledTask, tmp_path: Path
):
    assert real.state == "starting"
    texts = ["fine", "not for me", "fine", "word " * 400]
    answers = real.answer(texts)
    assert answers[0] == answers[2]
    assert answers[3] is None  # longer than any prompt to come
    for answer in answers[:3]:
        assert answer is not None
        assert compiled.task.fit(answer)
    assert real.state == "ready"
    os.kill(real._engine.result().pid, signal.SIGKILL)
    with pytest.raises(EngineError):
        real.answer(["fine"])
    kept = KeptTeacher(real, "transformers", compiled, str(tmp_path))
    assert kept.answer(["fine"]) == answers[:1]
    kept.close()
    (table,) = open_shards(str(tmp_path)).tables()
    assert np.isfinite(table.logprobs).all()


def test_what_is_no_teacher_of_this_student_is_refused(compiled: CompiledTask, tmp_path: Path):
    with pytest.raises(UserError, match="is not a model"):
        FallbackTeacher(str(tmp_path), TeacherConfig(), compiled)
    save_teacher(tmp_path, seed=0)
    tiny_tokenizer(280).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^the teacher .* does not fit the student: another tokenizer \("):
        FallbackTeacher(str(tmp_path), TeacherConfig(), compiled)
