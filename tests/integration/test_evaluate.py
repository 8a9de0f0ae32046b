"""`retort evaluate` on a cluster, from the parts that a killed one left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pipeline.config import TrackingConfig
from pipeline.shards.manifest import Shards
from student.config import FloorsConfig
from student.evaluate.evaluate import REPORT, measure
from student.evaluate.parts import Part, Worker
from tests.integration.conftest import Retort
from tests.integration.ray_cluster import RayCluster
from tests.student.conftest import compiled, shards
from tests.student.trained import train_here
from tests.tiny import ROOT

__all__ = ["compiled", "shards"]


@pytest.mark.slow
def test_a_cluster_finishes_what_a_killed_evaluation_began(
    retort: Retort, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(tmp_path, shards, TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    student, report, do = str(tmp_path / "student"), tmp_path / "report", Worker.part
    wanted = measure(FloorsConfig(), shards.folder, student, str(tmp_path / "here"))

    def part(self: Worker, part: Part) -> int:
        if part.kind != "answers":
            raise KeyboardInterrupt
        return do(self, part)

    monkeypatch.setattr(Worker, "part", part)
    with pytest.raises(KeyboardInterrupt):
        measure(FloorsConfig(), shards.folder, student, str(report))
    (left,) = report.glob("parts/*/answers-test-*")
    arrays = load_file(left)
    arrays["cost"][1] = 1e6  # seconds: by this it is known again
    save_file(arrays, left)
    command = [sys.executable, "-m", "pipeline.cli", "evaluate", f"--shards={shards.folder}", f"--out={tmp_path}"]
    with RayCluster() as cluster:
        done = subprocess.run(
            command, cwd=ROOT, env=retort.environment() | cluster.environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in report.iterdir()) == sorted(REPORT)
    found = json.loads((report / "fidelity.json").read_text())
    assert found["speed"]["student_answers_per_second"] < 1
    assert "1 threads" in found["speed"]["student_device"]
    assert found["student"] == wanted["student"]
    assert found["floors"] == wanted["floors"]
    assert found["steps"]["kl"] == pytest.approx(wanted["steps"]["kl"], rel=1e-5)
