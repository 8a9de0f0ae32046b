"""A training that was stopped or killed, at any step and how often, ends in the same bits as one that never was."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import student.train.loop
from pipeline.shards.manifest import Shards
from student.data.examples import open_examples
from student.data.unpack import TRAIN
from student.train.checkpoint import load_position
from student.train.loop import Loop, Position, Training
from student.train.strategy import State
from tests.numerics import resume

ROOT = Path(__file__).resolve().parents[2]
Measures = dict[tuple[int, bool], list[dict[str, float]]]


def start(shards: Shards, folder: Path, *fate: object) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.numerics.resume", shards.folder, folder, *fate]
    return subprocess.Popen([str(part) for part in command], cwd=ROOT)


def saves(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def last_save(folder: Path) -> tuple[State, dict[str, Any]]:
    state, position = load_position(str(saves(folder)[-1]))
    return state, position | {"history": [without_speeds(row) for row in position["history"]]}


def without_speeds(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "second" not in name}


def measures(folder: Path) -> Measures:
    """Of each report, as often as it was made: what a killed process did after its last save is done again."""
    found: Measures = {}
    for line in (folder / "measures.jsonl").read_text().splitlines():  # each was written at once
        step, ended, row = json.loads(line)
        found.setdefault((step, ended), []).append(without_speeds(row))
    return found


def assert_same_bits(ours: State, theirs: State) -> None:
    for part in ("weights", "first_moment", "second_moment", "average"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert mine.keys() == other.keys()
        different = [name for name in other if not torch.equal(mine[name], other[name])]
        assert not different, part


def test_killed_twice_a_training_ends_in_the_same_bits(shards: Shards, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201 - pytest shows it where the test fails
    rng = random.Random(seed)
    examples = len(open_examples(shards, TRAIN, "full"))
    steps = examples // resume.CONFIG.batch_size * resume.CONFIG.epochs
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(shards, whole)
    for fatal in sorted(rng.sample(range(resume.CONFIG.log_every, steps - 20), 2)):
        assert start(shards, killed, fatal, rng.uniform(0, 0.02)).wait(60) == -signal.SIGKILL
        assert not (killed / "done").exists()
    assert start(shards, killed).wait(60) == 0
    assert uninterrupted.wait(60) == 0
    (state, position), (expected_state, expected_position) = last_save(killed), last_save(whole)
    assert_same_bits(state, expected_state)
    assert without_speeds(position) == without_speeds(expected_position)
    expected, found = measures(whole), measures(killed)
    assert found.keys() == expected.keys()
    assert all(row == expected[key][0] for key, rows in found.items() for row in rows)


def test_from_any_report_a_training_goes_on_to_the_same_bits(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student.train.loop, "GRADIENTS_EVERY", 5)
    config = resume.CONFIG.model_copy(update={"epochs": 2})
    training = Training.of(resume.STUDENT, config, shards)
    loop, reports = Loop(training, shards), []
    for report in loop.run():
        resume.save(loop, training, tmp_path / f"step-{report.step:04d}-{report.epoch_ended:d}")
        reports.append((report.step, report.epoch_ended, without_speeds(report.row)))
    steps = loop.position.step // config.epochs
    assert steps % config.log_every  # some windows are cut short by the end of an epoch
    expected = [without_speeds(row) for row in loop.position.history]
    for done, folder in enumerate(saves(tmp_path), 1):
        state, position = load_position(str(folder))
        again = Loop(training, shards)
        again.go_on_from(state, Position(**position))
        rows = [(report.step, report.epoch_ended, without_speeds(report.row)) for report in again.run()]
        assert rows == reports[done:]
        assert_same_bits(again.state(), loop.state())
        assert [without_speeds(row) for row in again.position.history] == expected


def test_an_epoch_is_measured_whole_however_often_it_is_reported(shards: Shards) -> None:
    rows = {}
    for log_every in (3, 1000):
        config = resume.CONFIG.model_copy(update={"epochs": 1, "log_every": log_every})
        *windows, epoch = Loop(Training.of(resume.STUDENT, config, shards), shards).run()
        assert [report.epoch_ended for report in (*windows, epoch)] == [False] * len(windows) + [True]
        rows[log_every] = {name: value for name, value in epoch.row.items() if name.startswith(("train_", "validation_"))}
    assert rows[3] == pytest.approx(rows[1000], rel=1e-12)
    assert epoch.row["train_loss"] == epoch.row["loss"]  # one window, as long as the epoch
