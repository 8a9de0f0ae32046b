"""What `make local` promises, by its own configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import Retort


@pytest.mark.slow
def test_the_demos_student_gives_its_teachers_answers_and_beats_every_floor(retort: Retort, demo: Path, tmp_path: Path) -> None:
    where = [f"--comments={demo / 'comments.jsonl.gz'}", f"--teacher={demo / 'teacher'}", f"--out={tmp_path / 'out'}"]
    output = retort("run", "--config=pipeline/demo/run.yaml", *where)
    figures = json.loads((tmp_path / "out/report/fidelity.json").read_text())
    assert figures["student"]["whole"] >= 0.85
    assert figures["student"]["whole"] > max(floor["whole"] for floor in figures["floors"].values())
    assert "is above every floor" in output
