"""A plan from a scale.json: by hand, from the numbers the file was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.plan.estimate import Estimate, make_plan
from pipeline.base.errors import UserError
from tests.cluster.plan.plans import EXTRACT, planned, scale_json
from tests.tune.scaling.test_model import train_row


def hours(plan: Estimate) -> dict[tuple[str, int], float]:
    return {(name, point.workers["extract"]): each for point in plan.points for name, each in point.stage_hours.items()}


def test_it_predicts_what_it_was_made_of(tmp_path: Path) -> None:
    """3,072 comments are 12 units of 256; 2,457 train in 77 steps and 307 validate, three times."""
    plan = make_plan(planned(scale=scale_json(tmp_path), comments=3072))
    assert {stage.source for stage in plan.stages} == {"measured"}
    found = {key: 3600 * each for key, each in hours(plan).items()}
    calibration, manifest = 20 + 256 * 0.010, 12 * 0.002
    assert found["extract", 1] == pytest.approx(calibration + 20 + 3072 * 0.010 + manifest)
    assert found["extract", 2] == pytest.approx(calibration + 25 + 1536 * 0.013 + manifest)
    assert found["train", 1] == pytest.approx(9 + 3 * 77 * train_row(1, 32).step[0] + 3 * 307 * 0.002 / 3, rel=1e-3)
    assert found["train", 2] == pytest.approx(9 + 3 * 77 * train_row(2, 16).step[0] + 3 * 154 * 0.0025 / 3, rel=1e-3)
    assert ("train", 4) in found


def test_each_command_starts_once(tmp_path: Path) -> None:
    plain, slow = (tmp_path / name for name in ("plain", "slow"))
    rows = [row.model_copy(update={"command": 7.0}) for row in EXTRACT]
    plans = []
    for folder, measured in ((plain, EXTRACT), (slow, rows)):
        folder.mkdir()
        plans.append(hours(make_plan(planned(scale=scale_json(folder, extract=measured), comments=3072))))
    for stage in ("extract", "train"):
        assert 3600 * (plans[1][stage, 2] - plans[0][stage, 2]) == pytest.approx(7)


def test_a_start_nobody_measured_is_the_longest(tmp_path: Path) -> None:
    plan = make_plan(planned(scale=scale_json(tmp_path), comments=3072))
    assert 3600 * hours(plan)["extract", 4] == pytest.approx(20 + 2.56 + 25 + 3 * 256 * 0.013 + 12 * 0.002)


def test_few_comments_and_another_engine_for_the_codec(tmp_path: Path) -> None:
    plan = make_plan(planned("extract.codec=compact", scale=scale_json(tmp_path), comments=100))
    assert 3600 * hours(plan)["extract", 1] == pytest.approx(2 * (20 + 1.0) + 20 + 1.0 + 0.002)


def test_what_the_run_leaves_open_is_as_measured(tmp_path: Path) -> None:
    path = scale_json(tmp_path)
    work = make_plan(planned(scale=path)).work
    assert (work.epochs, work.batch, work.kept_steps, work.params) == (3, 32, 5, 1_000_000)
    other = make_plan(planned("train.epochs=5", "train.precision=bf16", "extract.capture=all", scale=path))
    assert (other.work.epochs, other.work.batch) == (5, 32)
    assert "measured with train.precision=float32, planned with bf16: times will differ" in other.warnings
    assert any("extract.capture=choices" in warning for warning in other.warnings)


def test_machines_without_a_gpu_are_planned_for(tmp_path: Path) -> None:
    path = scale_json(tmp_path)
    plan = make_plan(planned(scale=path, workers=4))
    assert [(stage.machine, stage.machines, stage.workers) for stage in plan.stages[:2]] == [("cpu-2", 2, 4)] * 2
    assert plan.elsewhere == {}  # the measured teacher's size is not known
    assert make_plan(planned(scale=path, teacher_params=8e6)).elsewhere


def test_a_stage_that_was_not_measured_goes_by_what_is_given(tmp_path: Path) -> None:
    path = scale_json(tmp_path, train=[])
    plan = make_plan(planned("student.layers=1", scale=path, seconds_per_example=0.5, seconds_per_answer=9))
    assert [stage.source for stage in plan.stages] == ["measured", "given", "given"]
    assert plan.stages[1].rate == pytest.approx(2)


def test_another_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another student \(its layers, width differ\)"):
        make_plan(planned("student.layers=2", "student.width=64", scale=scale_json(tmp_path)))


@pytest.mark.parametrize("content", ["[]", "{}", '{"measured": {"extract": [{}]}, "settings": {}}', '{"measured": 3}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scale.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"no scale\.json of retort scale"):
        make_plan(planned(scale=str(path)))
