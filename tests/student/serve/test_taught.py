from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.base.errors import UserError
from pipeline.config import TeacherConfig
from pipeline.shards.join import join
from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask, compile_for
from student.serve import taught
from student.serve.taught import KeptTeacher
from tests.student.predict.test_predict import Beside as Teacher
from tests.student.serve.conftest import FakeAnswerer, Serve


class Ready(Teacher):
    name, state = "a teacher", "ready"

    def close(self) -> None:
        """Nothing to end."""


def kept_teacher(compiled: CompiledTask, folder: Path) -> KeptTeacher:
    return KeptTeacher(Ready("", TeacherConfig(), compiled), "vllm", compiled, str(folder))  # type: ignore[arg-type]


def texts_in(folder: Path) -> list[str]:
    return [text for table in open_shards(str(folder)).tables() for text in table.texts]


def test_what_a_service_asks_its_teacher_is_kept_for_a_training(
    serve: Serve, compiled: CompiledTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taught, "ROWS", 3)
    for day in ("one", "two"):
        teacher = kept_teacher(compiled, tmp_path / "shards")
        with serve(FakeAnswerer(compiled, confidence=0.1), teacher, fallback=0.6) as client:
            for i in range(4):
                done = client.post("/classify", json={"texts": [f"day {day} {i}", f"unaskable {day} {i}7"]}).json()
                assert [result["source"] for result in done["results"]] == ["teacher", "student"]
            assert texts_in(tmp_path / "shards")[-3:] == [f"day {day} {i}" for i in range(3)]  # while it runs
    wanted = [f"day {day} {i}" for day in ("one", "two") for i in range(4)]
    assert texts_in(tmp_path / "shards") == wanted
    keys = [tuple(key) for table in open_shards(str(tmp_path / "shards")).tables() for key in table.keys.tolist()]
    assert len(set(keys)) == len(wanted)
    assert join([str(tmp_path / "shards")], str(tmp_path / "joined")).rows == len(wanted)


def test_an_answer_is_written_within_seconds(compiled: CompiledTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught, "SECONDS", 0.01)
    teacher = kept_teacher(compiled, tmp_path)
    for text in ("fine", "good"):
        teacher.answer([text])
        timer = teacher._timer
        assert timer is not None
        timer.join()
    killed = kept_teacher(compiled, tmp_path)  # as after a kill
    assert texts_in(tmp_path) == ["fine", "good"]
    killed.close()


def test_shards_of_another_task_are_left_alone(compiled: CompiledTask, tmp_path: Path) -> None:
    teacher = kept_teacher(compiled, tmp_path)
    teacher.answer(["fine"])
    teacher.close()
    changed = compiled.task.model_copy(update={"instruction": "Something else."})
    with pytest.raises(UserError, match="does not fit"):
        kept_teacher(compile_for(changed, compiled.tokenizer), tmp_path)
    assert texts_in(tmp_path) == ["fine"]
