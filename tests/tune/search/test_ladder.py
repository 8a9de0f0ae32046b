"""How the ladder picks; that it trains, goes on and copies its pick is in tests/integration/test_run.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.config import ClusterSettings
from pipeline.base.errors import UserError
from pipeline.cli.main import main
from pipeline.shards.manifest import Shards
from tests.tiny import save_teacher
from tune.search import ladder
from tune.search.ladder import Rung, rank


def rung(name: str, agreement: float, latency_ms: float) -> Rung:
    return Rung(name, agreement, latency_ms, parameters=1, epochs=1, seconds=1.0, test=0.0)


@pytest.mark.parametrize(("points", "best"), [(0.0, "slow"), (0.5, "slow"), (0.6, "fast")])
def test_twice_the_time_must_be_worth_its_points(points: float, best: str) -> None:
    rungs = [rung("fast", 0.80, 1.0), rung("worse", 0.79, 1.0), rung("slow", 0.811, 4.0)]
    ranked = rank(rungs, points)
    assert ranked[0].name == best
    assert {one.name for one in ranked} == {"fast", "worse", "slow"}


def test_a_student_that_a_floor_equals_comes_behind_one_that_is_above_it() -> None:
    fast, slow = replace(rung("fast", 0.960, 1.9), floor=0.961), replace(rung("slow", 0.974, 17.2), floor=0.961)
    assert [one.name for one in rank([fast, slow], 0.5)] == ["slow", "fast"]
    assert str(fast) == "fast (96.0 % of validation answers, 1.9 ms, a floor 96.1 %)"
    assert [one.name for one in rank([fast, replace(slow, floor=0.98)], 0.5)] == ["fast", "slow"]


def rungs(shards: Shards, **about: Any) -> dict[str, Any]:
    student = {"layers": 3, "dropout": 0.2} | about.pop("student", {})
    return ladder.rungs_of(ClusterSettings.model_validate({"ladder": about, "student": student}), shards)


def test_each_rung_has_its_start_and_a_teacher_that_cannot_be_cut_has_none(shards: Shards) -> None:
    found = rungs(shards, readers=["models/MiniLM/"], rungs="own,teacher,ngrams")
    assert list(found) == ["own", "ngrams", "MiniLM"]  # the made-up teacher is no model
    assert {name: config.student.reader for name, config in found.items()} == {
        "ngrams": "ngrams",
        "own": None,  # as the student is by itself
        "MiniLM": "models/MiniLM/",
    }
    assert list(rungs(shards, rungs="own")) == ["own"]


def test_the_students_own_reader_is_a_rung_too(shards: Shards) -> None:
    found = rungs(shards, rungs="own", student={"reader": "models/bert"})
    assert {name: config.student.reader for name, config in found.items()} == {"own": "own", "bert": "models/bert"}


@pytest.mark.parametrize("readers", [["a/bert", "b/bert"], ["models/own"]])
def test_two_rungs_of_one_name_are_refused(shards: Shards, readers: list[str]) -> None:
    with pytest.raises(UserError, match=r"two rungs of the ladder are called (bert|own)"):
        rungs(shards, readers=readers)


def test_a_reader_that_is_nowhere_is_refused_before_anything_is_paid_for(tmp_path: Path) -> None:
    named = ["--task=tasks/demo.yaml", "--teacher=none", "--comments=none.jsonl", f"--out={tmp_path / 'out'}"]
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(main, ["run", *named, f"--reader={tmp_path / 'empty'}"])
    assert (done.exit_code, "no tokenizer.json in" in done.output) == (1, True)
    assert not (tmp_path / "out/comments").exists()


def test_half_of_a_teacher_has_its_shape(shards: Shards, tmp_path: Path) -> None:
    save_teacher(tmp_path, seed=0)
    teacher = shards.manifest.teacher.model_copy(update={"model": str(tmp_path)})
    manifest = shards.manifest.model_copy(update={"teacher": teacher})
    found = rungs(Shards(shards.folder, manifest, shards.compiled), rungs=["teacher"])["teacher"]
    assert (found.prune.source, found.prune.fraction) == (str(tmp_path), 0.5)
    assert (found.student.layers, found.student.dropout, found.student.sequence) == (None, 0.2, "choices")


def test_minutes_bound_the_epochs_and_what_was_found_stays(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder.Loop, "seconds_an_epoch", lambda *_: 20.0)
    config = ClusterSettings.model_validate(
        {"ladder": {"minutes": 2}, "train": {"batch_size": 16}, "student": {"width": 32, "heads": 2}}
    )
    path = str(tmp_path / "epochs.json")
    assert ladder._epochs(config, shards.folder, path) == 6
    monkeypatch.setattr(ladder.Loop, "seconds_an_epoch", lambda *_: 1.0)
    assert ladder._epochs(config, shards.folder, path) == 6
