"""Pruning as a person runs it: students cut from a student and from the teacher, trained further, and a chain killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from tests.integration.conftest import Retort
from tests.student.conftest import compiled, made_up_shards
from tests.tiny import ROOT, save_teacher

__all__ = ["compiled"]

TRAIN = ["--set=train.batch_size=16", "--set=train.threads=1", "--set=train.learning_rate=0.003"]
PRUNE = ["--set=prune.examples=64"]
SHAPE = ["--set=student.layers=2", "--set=student.width=32", "--set=student.heads=4", "--set=student.mlp=64"]


@pytest.fixture(scope="module")
def shards(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_up_shards(tmp_path_factory.mktemp("shards"), compiled, 1000)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder, seed=0)
    return folder


@pytest.mark.slow
def test_a_student_cut_from_the_teacher_trains_and_follows_it(
    retort: Retort, shards: Shards, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "half"
    assert "nothing says how small" in retort.refuses("prune", f"--from={teacher}", f"--shards={shards.folder}", f"--out={out}")
    said = retort("prune", f"--from={teacher}", f"--shards={shards.folder}", f"--out={out}", "--fraction=1/2", *PRUNE)
    assert f"retort train --init {out}/pruned --shards {shards.folder} --out {out}" in said
    about = json.loads((out / "pruned/prune.json").read_text())
    assert about["parameters"]["student"] <= about["parameters"]["source"] / 2
    assert "<svg" not in (out / "pruned/importance.html").read_text()  # drawings are data URIs
    refused = retort.refuses("evaluate", f"--student={out}/pruned", f"--shards={shards.folder}", f"--out={out}")
    assert f"was not trained: `retort train --init {out}/pruned` does" in " ".join(refused.split())
    init = [f"--init={out}/pruned", f"--shards={shards.folder}", f"--out={out}", *TRAIN]
    refused = retort.refuses("train", *init, "--set=student.layers=1")
    assert "has its shape already: leave student.layers out" in " ".join(refused.split())
    retort("train", *init, "--set=train.epochs=3", "--set=train.hidden=0.1", "--set=train.workers=2")
    trained = json.loads((out / "student/train.json").read_text())
    losses = [epoch["validation_ce"] for epoch in trained["epochs"]]
    assert losses[-1] < 0.5 * losses[0]
    assert all(epoch["train_hidden"] > 0 for epoch in trained["epochs"])
    run = MlflowClient(trained["mlflow"]["uri"]).get_run(trained["mlflow"]["run"])
    assert run.data.params["pruned.from"] == str(teacher)
    assert run.data.params["pruned.fraction"] == "0.5"


# Files whose coming tells what is under way: cutting, training, the report, what lies between two stages.
STAGES = ["1-2/pruned/model.safetensors", "1-2/student/checkpoints", "1-2/report/fidelity.json", "1-4/pruned/prune.json"]


@pytest.mark.slow
def test_a_chain_killed_in_each_of_its_stages_goes_on(
    retort: Retort, compiled: CompiledTask, shards: Shards, tmp_path: Path
) -> None:
    first, out = tmp_path / "first", tmp_path / "family"
    retort("train", f"--shards={shards.folder}", f"--out={first}", *SHAPE, *TRAIN, "--set=train.epochs=1")
    command = [
        "prune",
        f"--from={first}/student",
        f"--shards={shards.folder}",
        f"--out={out}",
        "--chain=1/2,1/4,1/8",
        *PRUNE,
        *TRAIN,
    ]
    command += ["--set=train.epochs=2", "--set=train.checkpoint_minutes=0.01"]
    for stage in STAGES:
        kill_when(retort, command, out / "chain" / stage)
    before = {path: path.stat().st_mtime_ns for path in (out / "chain/1-2").rglob("model.safetensors")}
    said = retort(*command)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "1/8" in said
    links = [json.loads((out / f"chain/{link}/pruned/prune.json").read_text()) for link in ("1-2", "1-4", "1-8")]
    whole = links[0]["parameters"]["source"]
    shares = (1 / 2, 1 / 4, 1 / 8)
    for link, share in zip(links, shares, strict=True):  # shares of the first source, not of the link before
        assert 0.5 * share * whole < link["parameters"]["student"] <= share * whole
    assert links[1]["source"]["student"] == str(out / "chain/1-2/student")
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    (experiment,) = (one.experiment_id for one in client.search_experiments() if one.name == "retort")
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert sorted(runs) == ["1/2", "1/4", "1/8", "chain"]
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert runs["1/4"].data.params["pruned.parent_run"] == runs["1/2"].info.run_id
    assert runs["1/4"].data.tags["mlflow.parentRunId"] == runs["chain"].info.run_id
    assert 0 <= runs["1/4"].data.metrics["test/whole"] <= 1
    assert (out / "chain/compare.html").exists()


def kill_when(retort: Retort, command: list[str], there: Path) -> None:
    """Runs the command and kills it and all its processes as soon as a file is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *command],
        cwd=ROOT,
        env=retort.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not there.exists():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < until, f"{there} did not come"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
