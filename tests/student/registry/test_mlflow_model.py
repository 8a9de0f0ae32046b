from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.base.errors import UserError
from pipeline.base.tracking import Tracking
from pipeline.task.compiled import CompiledTask
from student.decode.decode import Decoder
from student.model.checkpoint import load_temperatures, save_student, save_temperatures
from student.model.model import Student
from student.registry.mlflow_model import log_report, log_student, register_best
from tests.student.decode.test_decode import make_student

NAME = "tiny-task"
COMMENTS: list[Any] = [f"{'very ' * (i % 7)}{i} comments, {chr(97 + i % 26)}" for i in range(140)]  # more than a batch
COMMENTS[3] = "  white space around it\n"
SET_ASIDE = {
    0: (None, "malformed: the text is null"),
    5: ("", "too_short"),
    6: ("long " * 60, "too_long"),
    7: ("see https://example.com", "urls"),
    8: ("end it<end_of_turn>now", "special_tokens"),
    9: ("half a character \ud800", "malformed: not UTF-8"),
    10: (3, "malformed: the text is int"),
    139: (None, "malformed: the text is null"),
}
for place, (comment, _) in SET_ASIDE.items():
    COMMENTS[place] = comment

LOAD = """
import importlib.util, json, sys
from pathlib import Path

hidden, uri, model, given, got = sys.argv[1:]
if hidden == "hidden":
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
    assert not any(importlib.util.find_spec(name) for name in ("pipeline", "student", "cluster", "tune"))
    sys.modules.update(dict.fromkeys(("ray", "transformers", "deepspeed", "vllm")))  # importing them fails

import mlflow
import pandas as pd

mlflow.set_tracking_uri(uri)
loaded = mlflow.pyfunc.load_model(model)
comments = json.loads(Path(given).read_text())
answers = loaded.predict(pd.DataFrame({"text": comments}, index=range(5, 5 + len(comments))))
assert list(answers.index) == list(range(5, 5 + len(comments)))
assert loaded.predict(pd.DataFrame({"text": []}, dtype=object)).columns.tolist() == answers.columns.tolist()
alone = loaded.predict([{"text": comments[1]}, {"text": comments[0]}])
assert alone.isna().sum(axis=1).tolist() == [1, 2]
columns = answers.to_dict("list")
Path(got).write_text(json.dumps(columns | {"code": sys.modules["student"].__file__}, allow_nan=False))
"""


@dataclass(frozen=True)
class Logged:
    uri: str
    run_id: str
    student: Student
    folder: str
    model_uri: str
    standing: Path  # the folder the process stood in

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def another_run(self) -> str:
        return Tracking.start(self.uri, "tests", "another run", {}, "student").run_id

    @property
    def model_id(self) -> str:
        return self.model_uri.removeprefix("models:/")


@pytest.fixture(scope="module")
def logged(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder, standing = tmp_path_factory.mktemp("logged"), tmp_path_factory.mktemp("standing")
    for name in ("uv.lock", "pyproject.toml"):  # somebody's uv project
        (standing / name).write_text("")
    student = make_student(compiled, seed=0, scale=8.0)
    save_student(str(folder / "student"), student, compiled)
    save_temperatures(str(folder / "student"), {"mood": 3.0, "loud": 1.0})
    (folder / "student" / "optimizer.safetensors").write_bytes(b"not the model's")
    uri = f"sqlite:///{folder}/mlflow.db"
    run = Tracking.start(uri, "tests", "a run", {"seed": 1}, "student").run_id
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(standing)
        model_uri = log_student(uri, run, (folder / "student").as_uri())
        assert register_best(uri, model_uri, NAME, description="the best of two", tags={"choice_kl": 0.25}) == "1"
    return Logged(uri, run, student, str(folder / "student"), model_uri, standing)


@pytest.fixture(scope="module")
def files(logged: Logged) -> Path:
    return Path(logged.client.get_logged_model(logged.model_id).artifact_location.removeprefix("file://"))


def expected(logged: Logged, compiled: CompiledTask) -> list[Any]:
    """What the decoder alone answers, a comment at a time."""
    decoder, answers = Decoder(logged.student, compiled), []
    for place, text in enumerate(COMMENTS):
        if place in SET_ASIDE:
            answers.append(None)
            continue
        ids = compiled.tokenizer.encode([text.strip(), compiled.task.separator])
        answers.append(
            compiled.task.parse(compiled.tokenizer.decode(decoder.constrained([np.array(ids[0] + ids[1])]).tokens[0]))
        )
    return answers


@pytest.mark.parametrize("retort", ["hidden", pytest.param("installed", marks=pytest.mark.slow)])
def test_another_process_loads_it_by_its_alias(logged: Logged, compiled: CompiledTask, retort: str, tmp_path: Path) -> None:
    given, got, empty = tmp_path / "given.json", tmp_path / "got.json", tmp_path / "empty"
    empty.mkdir()
    given.write_text(json.dumps(COMMENTS))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    command = [sys.executable, "-P", "-c", LOAD, retort, logged.uri, f"models:/{NAME}@best", str(given), str(got)]
    ended = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(got.read_text())
    answers = [None if answer is None else compiled.task.parse(answer) for answer in found["answer"]]
    assert answers == expected(logged, compiled)
    assert len(set(answers)) > 2
    assert {place: reason for place, reason in enumerate(found["reason"]) if reason} == {
        place: reason for place, (_, reason) in SET_ASIDE.items()
    }
    assert all((confidence is None) == (place in SET_ASIDE) for place, confidence in enumerate(found["confidence"]))
    assert Path(found["code"]).parent.parent.name == "code"  # the model's own, also where Retort is installed
    assert not list(empty.iterdir())


def test_what_is_kept(logged: Logged, files: Path, compiled: CompiledTask) -> None:
    names = {path.name for path in files.rglob("*") if path.is_file()}
    endings = {Path(name).suffix for name in names - {"MLmodel", "registered_model_meta"}}  # the latter is left by loading
    assert endings == {".py", ".json", ".yaml", ".txt", ".safetensors"}  # no pickle
    assert "__pycache__" not in {path.name for path in files.rglob("*")}
    assert "optimizer.safetensors" not in names
    assert load_temperatures(str(files / "artifacts/student"), compiled.task) == {"mood": 3.0, "loud": 1.0}
    model = mlflow.models.Model.load(str(files))
    assert model.model_id == logged.model_id
    assert model.run_id == logged.run_id
    assert model.signature.inputs.to_dict() == [{"type": "string", "name": "text", "required": True}]
    assert model.signature.outputs.input_names() == ["answer", "confidence", "reason"]
    example = model.load_input_example(str(files))
    assert len(example) == 2
    assert all(isinstance(text, str) for text in example["text"])
    requirements = (files / "requirements.txt").read_text().split()
    assert f"mlflow=={mlflow.__version__}" in requirements
    assert not [line for line in requirements if "+" in line or "retort" in line]


def test_the_run_names_its_model_and_no_other_store_is_touched(logged: Logged) -> None:
    model = logged.client.get_logged_model(logged.model_id)
    assert (model.name, model.status.name, model.source_run_id) == ("student", "READY", logged.run_id)
    assert model.params == {"seed": "1"}
    outputs = logged.client.get_run(logged.run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [logged.model_id]
    assert mlflow.active_run() is None
    assert sorted(path.name for path in logged.standing.iterdir()) == ["pyproject.toml", "uv.lock"]


def test_a_run_has_one_model(logged: Logged) -> None:
    assert log_student(logged.uri, logged.run_id, logged.folder) == logged.model_uri


def test_the_alias_moves_to_the_newest_version(logged: Logged) -> None:
    first = logged.client.get_model_version(NAME, "1")
    assert (first.description, first.tags, first.run_id) == ("the best of two", {"choice_kl": "0.25"}, logged.run_id)
    newer = log_student(logged.uri, logged.another_run(), logged.folder)
    for model_uri, expected_version in ((logged.model_uri, "1"), (logged.model_uri, "1"), (newer, "2")):
        assert register_best(logged.uri, model_uri, "another", alias="champion") == expected_version
        assert str(logged.client.get_model_version_by_alias("another", "champion").version) == expected_version


def test_a_model_whose_upload_fails_is_marked_so(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MlflowException("the disk is full")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", fail)
    with pytest.raises(UserError, match="the disk is full"):
        log_student(logged.uri, logged.another_run(), logged.folder)
    experiment = logged.client.get_run(logged.run_id).info.experiment_id
    statuses = [model.status.name for model in logged.client.search_logged_models([experiment])]
    assert statuses.count("FAILED") == 1


def test_what_cannot_be_logged(logged: Logged, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no student"):
        log_student(logged.uri, logged.run_id, str(tmp_path))
    with pytest.raises(UserError, match="cannot be used"):
        log_student(logged.uri, "0" * 32, logged.folder)
    with pytest.raises(UserError, match="cannot be used"):
        register_best(logged.uri, "models:/m-0", NAME)


def test_a_report_among_the_artifacts(logged: Logged, tmp_path: Path) -> None:
    (tmp_path / "fidelity.html").write_text("<p>")
    log_report(logged.uri, logged.run_id, tmp_path.as_uri())
    assert [file.path for file in logged.client.list_artifacts(logged.run_id, "report")] == ["report/fidelity.html"]
