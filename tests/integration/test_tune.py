"""A search as a person runs it: killed, resumed, with a trial that fails; and what MLflow then knows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from tests.integration.conftest import Retort
from tests.student.conftest import compiled, made_up_shards
from tests.tiny import ROOT
from tune.search.trials import Trial

__all__ = ["compiled"]

SPACE = """
student.layers: [1, 2]
student.width: [16, 32]
student.head_width: [16]
student.mlp_ratio: [2]
train.learning_rate: {low: 0.003, high: 0.03, log: true}
"""
MOST = 10_000  # parameters: less than those of the widest and deepest
SETTINGS = [
    "--trials=3",
    "--set=train.epochs=3",
    "--set=train.batch_size=16",
    "--set=train.threads=1",
    f"--max-params={MOST}",
]
BROKEN = 1  # the trial whose student has no folder to go to


@pytest.fixture(scope="module")
def shards(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_up_shards(tmp_path_factory.mktemp("shards"), compiled, 600)


@pytest.fixture
def command(shards: Shards, tmp_path: Path) -> list[str]:
    (tmp_path / "space.yaml").write_text(SPACE)
    out = os.path.relpath(tmp_path, ROOT)  # trials work in other folders
    return ["tune", f"--shards={shards.folder}", f"--out={out}", f"--space={tmp_path / 'space.yaml'}", *SETTINGS]


def states(out: Path) -> dict[int, str]:
    records = [json.loads(path.read_text()) for path in sorted((out / "search/trials").glob("*/trial.json"))]
    return {record["number"]: record["state"] for record in records}


def begun(retort: Retort, command: list[str], out: Path) -> subprocess.Popen[bytes]:
    """The search, once a trial has ended well and another is in training."""
    with (out / "log").open("wb") as log:
        whole = [sys.executable, "-m", "pipeline.cli", *command]
        process = subprocess.Popen(whole, cwd=ROOT, env=retort.environment(), stdout=log, stderr=log)
    while not {"finished", "stopped"} & set(states(out).values()) or not training(out):
        assert process.poll() is None, (out / "log").read_text()
        time.sleep(0.05)
    return process


def training(out: Path) -> bool:
    running = [number for number, state in states(out).items() if state == "running"]
    return any(list((out / f"search/trials/{number:04d}").glob("student/checkpoints/step-*")) for number in running)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All processes of the search's Ray but its agents, which look for their raylet once in a while."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [member for member in family if not member.name().endswith("Agent")]


def children(out: Path) -> tuple[Run, list[Run]]:
    """The search's run in MLflow, and its trials'."""
    runs = MlflowClient(f"sqlite:///{out}/mlflow.db").search_runs(["1"])
    (parent,) = (run for run in runs if run.data.tags["retort.kind"] == "search")
    return parent, [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def test_a_killed_search_goes_on_and_mlflow_knows_every_trial(retort: Retort, command: list[str], tmp_path: Path) -> None:
    (tmp_path / f"search/trials/{BROKEN:04d}").mkdir(parents=True)
    (tmp_path / f"search/trials/{BROKEN:04d}/student").write_text("no folder")
    process = begun(retort, command, tmp_path)
    workers = workers_of(process)
    process.kill()
    process.wait()
    assert "worker processes have been started" not in (tmp_path / "log").read_text()
    assert not psutil.wait_procs(workers, timeout=60)[1]

    first = {number: state for number, state in states(tmp_path).items() if state != "running"}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("search/trials/*/student/train.json")}
    said = retort("tune", "--resume", f"--out={tmp_path}")
    assert "Traceback" not in said
    ended = states(tmp_path)
    assert ended.keys() == {0, 1, 2}
    assert first.items() <= ended.items()
    assert ended[BROKEN] == "failed"
    assert set(ended.values()) <= {"finished", "stopped", "failed"}
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not list(tmp_path.glob("search/trials/*/student/checkpoints/step-*"))

    parent, trials = children(tmp_path)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["space.student.layers"] == "[1, 2]"
    assert sorted(run.info.run_name for run in trials) == [f"trial-{number:04d}" for number in range(3)]
    status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    for run in trials:
        state = ended[int(run.info.run_name.removeprefix("trial-"))]
        assert (run.data.tags["retort.state"], run.info.status) == (state, status[state])
    (failed,) = (run for run in trials if run.info.status == "FAILED")
    assert "student" in failed.data.tags["retort.reason"]
    finished = next(run for run in trials if run.info.status == "FINISHED")
    assert {"student.layers", "train.learning_rate", "train.kl_start", "shards.digest"} <= finished.data.params.keys()
    assert {
        "loss",
        "validation_answer_accuracy",
        "test/whole",
        "test/field/mood",
        "speed/latency_ms",
    } <= finished.data.metrics.keys()
    records = [json.loads(path.read_text()) for path in tmp_path.glob("search/trials/*/trial.json")]
    assert all(record["parameters"] <= MOST for record in records)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [file.path for file in client.list_artifacts(finished.info.run_id, "report")] == [
        "report/fidelity.html",
        "report/fidelity.json",
        "report/suspects.jsonl",
    ]
    best = max((Trial(**record) for record in records if record["model"]), key=lambda trial: trial.score(0.5))
    assert client.get_model_version_by_alias("retort-tiny", "best").run_id == best.run_id
    assert (tmp_path / "search/compare.html").exists()

    assert "already holds this search" in retort.here("tune", "--resume", f"--out={tmp_path}")
    assert "holds another search" in retort.refuses(*command, "--max-params=10000000")


@pytest.mark.slow
def test_a_student_that_is_too_slow_is_refused_before_it_trains(retort: Retort, command: list[str], tmp_path: Path) -> None:
    retort(*command, "--trials=2", "--max-latency-ms=0.001")
    assert set(states(tmp_path).values()) == {"refused"}
    assert not list(tmp_path.glob("search/trials/*/student"))


@pytest.mark.slow
def test_ctrl_c_saves_the_trials_and_the_same_command_goes_on(retort: Retort, command: list[str], tmp_path: Path) -> None:
    process = begun(retort, command, tmp_path)
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "log").read_text()
    assert "Run the same command again to go on" in (tmp_path / "log").read_text()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    parent, trials = children(tmp_path)
    assert parent.info.status == "KILLED"
    assert {run.info.status for run in trials} <= {"FINISHED", "KILLED"}
    assert "interrupted" in {run.data.tags["retort.state"] for run in trials}
    retort(*command)
    parent, trials = children(tmp_path)
    assert (parent.info.status, len(trials)) == ("FINISHED", 3)
    assert {run.data.tags["retort.state"] for run in trials} <= {"finished", "stopped"}
