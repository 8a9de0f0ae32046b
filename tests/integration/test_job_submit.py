"""The way to a cluster: the same command as a Ray job, its code taken from the submitted working directory."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.manifest import open_shards
from tests.tiny import ROOT

RAY = Path(sys.executable).parent / "ray"
PORT, DASHBOARD = "26379", "28265"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head of its own on loopback, and the environment to reach it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment.pop("PYTHONPATH", None)
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PATH"] = f"{RAY.parent}{os.pathsep}{environment['PATH']}"  # a job's `python` is the first on the head's PATH
    options = ["--head", "--node-ip-address=127.0.0.1", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=2"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:  # sockets' paths must be short
        head = subprocess.Popen([RAY, "start", "--block", *options, f"--temp-dir={short}"], env=environment, cwd=tmp_path)
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{DASHBOARD}"}
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()
        head.wait()


@pytest.mark.slow
def test_extraction_runs_as_a_job(cluster: dict[str, str], demo: Path, tmp_path: Path) -> None:
    arguments = {"task": "tasks/demo.yaml", "teacher": demo / "teacher", "comments": demo / "comments.jsonl.gz"}
    named = [f"--{name}={value}" for name, value in arguments.items()]
    job = ["python", "-m", "pipeline.cli", "extract", *named, "--limit=64", f"--out={tmp_path / 'out'}"]
    command = [RAY, "job", "submit", "--working-dir", ROOT, "--", *job, "--set=extract.calibration_floor=0.8"]
    while subprocess.run([RAY, "job", "list"], env=cluster, capture_output=True, check=False).returncode:
        time.sleep(1)  # the head is still starting; pytest's own time-out ends a wait in vain
    done = subprocess.run(command, env=cluster, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert open_shards(str(tmp_path / "out/shards")).manifest["rows"] == 64
