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
from typing import Any

import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster

from pipeline.cli.settings import load_config
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.config import StudentConfig
from student.train.checkpoint import load_position
from student.train.loop import Loop, Training
from tests.integration.conftest import Retort
from tests.student.conftest import compiled, made_up_shards
from tests.tiny import ROOT

__all__ = ["compiled"]

STUDENT = ["layers=2", "width=32", "heads=2", "mlp=64", "dropout=0.1"]
TRAIN = ["epochs=16", "batch_size=16", "checkpoint_minutes=0.01", "log_every=7", "threads=1"]
SETTINGS = [*(f"--set=student.{one}" for one in STUDENT), *(f"--set=train.{one}" for one in TRAIN)]


@pytest.fixture(scope="module")
def shards(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_up_shards(tmp_path_factory.mktemp("shards"), compiled, 3000)


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "student/checkpoints").glob("step-*/position.json"))


@contextmanager
def started(retort: Retort, shards: Shards, out: Path, *more: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, from when it has saved a checkpoint that it did not find there."""
    known = checkpoints(out)
    command = [sys.executable, "-m", "pipeline.cli", "train", f"--shards={shards.folder}", f"--out={out}", *SETTINGS, *more]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=retort.environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
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


def training_of(shards: Shards, **changes: dict[str, Any]) -> Training:
    """The training of `SETTINGS` and some changes."""
    config = load_config(None, [one.removeprefix("--set=") for one in SETTINGS], {})
    student = StudentConfig.model_validate(config.student.model_dump(exclude_none=True) | changes.get("student", {}))
    return Training.of(student, config.train.model_copy(update=changes.get("train", {})), shards)


def undisturbed(shards: Shards, **changes: dict[str, Any]) -> Loop:
    """The same training in this process, without Ray, at its end. On one thread too, as these change the order of additions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loop = Loop(training_of(shards, **changes), shards)
    for _ in loop.run():
        pass
    torch.set_num_threads(threads)
    return loop


def measures(epochs: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if "second" not in k and k != "samples"} for row in epochs]


@pytest.mark.slow
def test_a_training_that_lost_its_worker_and_was_stopped_ends_as_an_undisturbed_one(
    retort: Retort, shards: Shards, tmp_path: Path
) -> None:
    with started(retort, shards, tmp_path) as driver:
        known = checkpoints(tmp_path)
        ray_worker(driver).kill()
        while not [path for path in checkpoints(tmp_path) if path not in known]:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.02)
        driver.send_signal(signal.SIGTERM)
        output, _ = driver.communicate(timeout=60)
        assert driver.returncode == 130, output
        assert "Run the same command again to go on" in output
    assert not (tmp_path / "student/train.json").exists()
    retort("train", f"--shards={shards.folder}", f"--out={tmp_path}", *SETTINGS)
    calm, about = undisturbed(shards), json.loads((tmp_path / "student/train.json").read_text())
    assert measures(about["epochs"]) == measures(calm.position.history)
    last = max(checkpoints(tmp_path)).parent
    state, _ = load_position(str(last))
    for ours, theirs in ((state.weights, calm.state().weights), (state.average, calm.state().average)):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    client = MlflowClient(about["mlflow"]["uri"])
    assert client.get_run(about["mlflow"]["run"]).info.status == "FINISHED"
    assert len(client.search_runs(["1"])) == 1
    assert len(checkpoints(tmp_path)) <= 2


@pytest.mark.slow
def test_workers_under_ray_train_what_one_does_without(retort: Retort, shards: Shards, tmp_path: Path) -> None:
    short = ["--set=train.epochs=2", "--set=student.sequence=choices", "--set=student.dropout=0"]
    how = ["workers=[1,2]", "cpus_per_worker=1", "strategy=zero3", "accumulation=2"]
    settings = [*SETTINGS, *short, *(f"--set=train.{one}" for one in how)]
    with started(retort, shards, tmp_path, *settings) as driver:
        driver.kill()
    assert not (tmp_path / "student/train.json").exists()
    retort("train", f"--shards={shards.folder}", f"--out={tmp_path}", *settings)
    theirs = json.loads((tmp_path / "student/train.json").read_text())["epochs"]
    ours = undisturbed(shards, student={"sequence": "choices", "dropout": 0}, train={"epochs": 2}).position.history
    for one, other in zip(ours, theirs, strict=True):
        assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=2e-2)
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=2e-2)


NOTICE = """
import sys, time, ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
ray.init(address=sys.argv[1], logging_level="ERROR")
deadline = int(time.time() * 1000) + 4_000
client = ray._private.worker.global_worker.gcs_client
print(client.drain_node(sys.argv[2], DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "a test", deadline))
"""


@pytest.mark.slow
def test_after_a_notice_that_its_machine_goes_a_training_goes_on_elsewhere(
    retort: Retort, shards: Shards, tmp_path: Path
) -> None:
    """It is no failure, of which none is allowed here."""
    settings = ["--set=train.epochs=60", "--set=train.max_failures=0"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        with started(retort, shards, tmp_path, *settings, RAY_ADDRESS=cluster.address) as driver:
            subprocess.run([sys.executable, "-c", NOTICE, cluster.address, node.node_id], check=True, timeout=60)
            cluster.add_node(num_cpus=1)
            time.sleep(5)
            assert driver.poll() is None, driver.communicate()[0]
            cluster.remove_node(node, allow_graceful=False)
            output, _ = driver.communicate(timeout=240)
            assert driver.returncode == 0, output
    finally:
        cluster.shutdown()
    epochs = json.loads((tmp_path / "student/train.json").read_text())["epochs"]
    assert len(epochs) == 60
