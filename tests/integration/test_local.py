"""What `make local` promises, by its own configuration, on half of its comments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.demo.build import build_demo
from tests.integration.conftest import Retort


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demos_student_gives_its_teachers_answers_and_beats_every_floor(retort: Retort, tmp_path: Path) -> None:
    comments, teacher = build_demo(str(tmp_path / "demo"), count=3000)
    where = [f"--comments={comments}", f"--teacher={teacher}", f"--out={tmp_path / 'out'}"]
    output = retort("run", "--config=pipeline/demo/run.yaml", *where, timeout=1000)
    figures = json.loads((tmp_path / "out/report/fidelity.json").read_text())
    assert figures["student"]["whole"] >= 0.85
    assert figures["student"]["whole"] > max(floor["whole"] for floor in figures["floors"].values())
    assert "is above every floor" in output
