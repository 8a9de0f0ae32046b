"""The way to a cluster: the same commands as jobs behind a token, a bucket that fails, and machines that go."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient

from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.train.checkpoint import load_position
from tests.integration.bucket import Bucket
from tests.integration.conftest import Retort
from tests.integration.ray_cluster import RAY, RayCluster
from tests.integration.test_training import SETTINGS, checkpoints, training_of
from tests.numerics.workers import train
from tests.student.conftest import compiled, made_up_shards
from tests.tiny import ROOT

__all__ = ["compiled"]

STUDENT = ["layers=1", "width=32", "heads=2", "mlp=64"]
TRAIN = ["epochs=3", "batch_size=32", "learning_rate=0.003", "workers=2", "threads=1", "machines=spot"]
EXTRACT = ["extract.rows_per_unit=30", "extract.calibration_floor=0.8"]
TEACHER = ["engine=transformers", "machines=spot", "actors=2", "cpus=1"]
SPOT = '{"spot": 1}'
Submit = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with Bucket("retort-test", share=0.015) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def cluster(bucket: Bucket) -> Iterator[RayCluster]:
    """A head, which has the bucket's credentials."""
    with RayCluster(**bucket.secrets) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def machines(cluster: RayCluster) -> RayCluster:
    """The same, with two machines of the kind that work is meant for."""
    for _ in range(2):
        cluster.add(resources=SPOT)
    return cluster


@pytest.fixture(scope="module")
def submit(retort: Retort, cluster: RayCluster, bucket: Bucket) -> Submit:
    """Starts `retort submit` with some arguments where the bucket's credentials are not known."""

    def start(*arguments: str, **changes: str) -> subprocess.Popen[str]:
        known = retort.environment() | cluster.environment | bucket.settings | changes
        for name in {"PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_MODE"} - changes.keys():  # a token is enough
            del known[name]
        command = [sys.executable, "-m", "pipeline.cli", "submit", *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def said(process: subprocess.Popen[str], code: int = 0) -> str:
    output = process.communicate(timeout=400)[0]
    assert process.returncode == code, output
    return output


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def store_with(bucket: Bucket, folder: Path) -> str:
    """MLflow's store in a folder, its artifacts in the bucket."""
    store = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(store).create_experiment("retort", f"s3://{bucket.name}/mlflow")
    return store


def test_a_job_trains_from_a_log_in_a_bucket_and_is_followed_to_its_end(submit: Submit, bucket: Bucket, tmp_path: Path) -> None:
    answer = {"sentiment": "mixed", "topic": "app", "urgency": "low"}
    rows = [
        {"body": f"{i} is {mood}", "answer": answer | {"sentiment": mood}} for i in range(200) for mood in ("mixed", "neutral")
    ]
    bucket.write("log/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    where = [f"--comments=s3://{bucket.name}/log/*.jsonl", f"--out=s3://{bucket.name}/small", "--answers=answer"]
    settings = [f"tracking.uri={store_with(bucket, tmp_path)}", "train.epochs=2", "train.threads=1", "floors.examples=0"]
    settings += [f"student.{one}" for one in STUDENT]
    options = ["--task=tasks/demo.yaml", "--ladder=own", *where, *(f"--set={one}" for one in settings)]
    assert said(submit("run", *options)).splitlines()[-1].endswith("succeeded")
    assert {"small/report/fidelity.html", "small/student/model.safetensors", "small/shards/manifest.json"} <= set(
        bucket.files()
    )


@pytest.fixture(scope="module")
def run(submit: Submit, machines: RayCluster, bucket: Bucket, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a whole run says, all of whose files are in the bucket. A machine goes in the middle of its extraction."""
    folder = tmp_path_factory.mktemp("mlflow")
    bucket.write("comments/demo.jsonl.gz", (demo / "comments.jsonl.gz").read_bytes())
    parts = {"student": STUDENT, "train": TRAIN, "teacher": TEACHER}
    settings = [
        *EXTRACT,
        f"tracking.uri={store_with(bucket, folder)}",
        *(f"{part}.{one}" for part, some in parts.items() for one in some),
    ]
    where = [f"--comments=s3://{bucket.name}/comments/*.gz", f"--out=s3://{bucket.name}/run", f"--teacher={demo / 'teacher'}"]
    options = [*where, "--task=tasks/demo.yaml", "--limit=600", "--ladder=own", *(f"--set={one}" for one in settings)]
    process, victim = submit("run", *options), machines.machines[-1]
    wait_for(lambda: len(shards_in(bucket)) >= 4 and has_engine(victim), process)
    machines.kill(victim)
    return said(process)


def shards_in(bucket: Bucket) -> list[str]:
    return [name for name in bucket.files() if name.startswith("run/shards/shard-")]


def has_engine(machine: subprocess.Popen[bytes]) -> bool:
    """Whether a teacher is at work on it."""
    with suppress(psutil.Error):  # a process that has just ended
        return any("pipeline.teacher.process" in one.cmdline() for one in psutil.Process(machine.pid).children(recursive=True))
    return False


@pytest.mark.slow
def test_a_job_is_followed_to_success_and_its_results_are_in_the_bucket(run: str, bucket: Bucket) -> None:
    assert re.search(r"extracted \d+ answers", run), run  # a commit whose news died with the machine is not among them
    assert run.splitlines()[-1].endswith("succeeded")
    files = set(bucket.files())
    assert {"run/report/fidelity.html", "run/student/model.safetensors", "run/shards/manifest.json"} <= files
    assert any(name.startswith("mlflow/") and name.endswith("fidelity.html") for name in files)


@pytest.mark.slow
def test_the_extraction_outlived_a_machine(run: str, bucket: Bucket) -> None:
    places = [f"{bucket.name}/{name}" for name in shards_in(bucket)]
    tables = [pq.read_table(place, columns=["row"], filesystem=bucket.fs) for place in places]
    rows = [row for table in tables for row in table["row"].to_pylist()]
    assert len(rows) == len(set(rows)) == 600


@pytest.mark.slow
def test_the_bucket_failed_and_no_shard_was_seen_before_it_was_whole(run: str, bucket: Bucket) -> None:
    assert bucket.faults.keys() == {"error", "late", "cut"}
    assert bucket.read > 6
    assert not bucket.torn


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running(run: str, submit: Submit, bucket: Bucket, cluster: RayCluster) -> None:
    process = submit("evaluate", f"--out=s3://{bucket.name}/run", "--set=tracking.uri=sqlite:////unused")
    assert process.stdout
    name = next(line.split()[1] for line in process.stdout if line.startswith("job retort-"))
    process.send_signal(signal.SIGINT)
    output = said(process, 130)
    assert "the job goes on" in output
    assert f"ray job stop --address http://127.0.0.1:{cluster.dashboard} {name}" in output
    status = cluster.ray("job", "status", name).stdout
    assert "RUNNING" in status or "PENDING" in status or "succeeded" in status, status
    cluster.ray("job", "stop", name)


def test_other_tokens_are_refused(submit: Submit, tmp_path: Path) -> None:
    train = ["train", f"--out={tmp_path}"]
    assert "Authentication failed" in said(submit(*train, RAY_AUTH_TOKEN="a" * 64), 1)
    output = said(submit(*train, RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled", HOME=str(tmp_path)), 1)
    assert "Authentication required" in output
    assert "RAY_AUTH_TOKEN" in output


@pytest.fixture(scope="module")
def shards(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_up_shards(tmp_path_factory.mktemp("shards"), compiled, 1000)


@pytest.mark.slow
def test_a_training_outlives_a_machine(submit: Submit, machines: RayCluster, shards: Shards, tmp_path: Path) -> None:
    """Submitted by the line that a dry run prints."""
    victim = machines.add(resources=SPOT)  # one went in the extraction
    changes = ["train.epochs=4", "train.workers=2", "train.cpus_per_worker=1", "train.machines=spot"]
    settings = [*SETTINGS, *(f"--set={one}" for one in changes)]
    line = said(submit("--dry-run", "train", f"--shards={shards.folder}", f"--out={tmp_path}", *settings))
    process = subprocess.Popen(
        [RAY, *shlex.split(line)[1:]],
        cwd=ROOT,
        env=os.environ | machines.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: checkpoints(tmp_path), process)
    machines.kill(victim)  # a worker's: there were two such machines, a CPU each
    assert not (tmp_path / "student/train.json").exists(), "the training ended before its machine did"
    machines.add(resources=SPOT)
    said(process)
    training = training_of(shards, train={"epochs": 4})
    torch.multiprocessing.spawn(train, (2, str(tmp_path), shards.folder, training), nprocs=2)
    state, _ = load_position(str(max(checkpoints(tmp_path)).parent))
    for name, tensor in torch.load(tmp_path / "weights", weights_only=True).items():
        assert torch.equal(state.weights[name], tensor), name
