"""Training under Ray Train as a person runs it: stopped, killed, resumed, and shared out among workers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient
from safetensors.numpy import load_file

from pipeline.compiled import CompiledTask
from pipeline.manifest import Shards
from tests.integration.conftest import Retort
from tests.student.conftest import compiled, made_up_shards
from tests.tiny import ROOT

__all__ = ["compiled"]

STUDENT = ["layers=2", "width=32", "heads=2", "mlp=64", "dropout=0.1"]
TRAIN = ["epochs=12", "batch_size=16", "checkpoint_minutes=0.01", "log_every=7", "samples=1"]
SETTINGS = [*(f"--set=student.{one}" for one in STUDENT), *(f"--set=train.{one}" for one in TRAIN)]


@pytest.fixture(scope="module")
def shards(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_up_shards(tmp_path_factory.mktemp("shards"), compiled, 3000)


def weights(out: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(out / "student/model.safetensors").items()}


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "student/checkpoints").glob("step-*/position.json"))


@contextmanager
def started(retort: Retort, shards: Shards, out: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, from when it has saved a checkpoint that it did not find there."""
    known = checkpoints(out)
    command = [sys.executable, "-m", "pipeline.cli", "train", f"--shards={shards.folder}", f"--out={out}", *SETTINGS]
    process = subprocess.Popen(
        command, cwd=ROOT, env=retort.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not [path for path in checkpoints(out) if path not in known]:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate()


def ray_worker(driver: subprocess.Popen[str]) -> psutil.Process:
    tree = psutil.Process(driver.pid).children(recursive=True)
    return next(
        process for process in tree if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline())
    )


@pytest.mark.timeout(400)
def test_a_training_killed_in_every_way_ends_with_the_weights_of_an_undisturbed_one(
    retort: Retort, shards: Shards, tmp_path: Path
) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    retort("train", f"--shards={shards.folder}", f"--out={calm}", *SETTINGS)
    with started(retort, shards, rough) as driver:
        driver.send_signal(signal.SIGTERM)
        output, _ = driver.communicate(timeout=60)
        assert driver.returncode == 130, output
        assert "Run the same command again to go on" in output
    assert not (rough / "student/train.json").exists()
    with started(retort, shards, rough) as driver:
        driver.kill()
    with started(retort, shards, rough) as driver:
        ray_worker(driver).kill()
        output, _ = driver.communicate(timeout=120)
        assert driver.returncode == 0, output
    assert weights(rough) == weights(calm)
    about = [json.loads((out / "student/train.json").read_text()) for out in (calm, rough)]
    measures = [[{k: v for k, v in row.items() if "second" not in k} for row in each["epochs"]] for each in about]
    assert measures[0] == measures[1]
    assert about[0]["best_epoch"] == about[1]["best_epoch"]
    run = MlflowClient(about[1]["mlflow"]["uri"]).get_run(about[1]["mlflow"]["run"])
    assert run.info.status == "FINISHED"
    assert len(MlflowClient(about[1]["mlflow"]["uri"]).search_runs(["1"])) == 1
    assert len(checkpoints(rough)) <= 2


def test_workers_train_what_one_does(retort: Retort, shards: Shards, tmp_path: Path) -> None:
    short = ["--set=train.epochs=2", "--set=student.sequence=choices", "--set=student.dropout=0"]
    changes = {
        "one": ["workers=1"],
        "as many as there is room for": ["workers=[1,2]", "cpus_per_worker=1"],
        "zero3": ["workers=2", "strategy=zero3", "accumulation=2"],
    }
    epochs = {}
    for name, how in changes.items():
        settings = [*SETTINGS, *short, *(f"--set=train.{one}" for one in how)]
        retort("train", f"--shards={shards.folder}", f"--out={tmp_path / name}", *settings)
        epochs[name] = json.loads((tmp_path / name / "student/train.json").read_text())["epochs"]
    for name in changes:
        for one, other in zip(epochs["one"], epochs[name], strict=True):
            assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=2e-2), name
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=2e-2), name
