from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from cluster.config import ClusterSettings
from pipeline.base.errors import UserError
from tune.config import TuneConfig
from tune.search.proposals import Proposals
from tune.search.space import Point
from tune.search.trials import Trial, read_trial, read_trials, save
from tune.search.tuner import asha

SPACE: dict[str, BaseDistribution] = {"student.layers": IntDistribution(1, 9)}


def size(point: Point) -> int:
    if point["student.layers"] > 6:
        raise UserError("too deep")
    return 1000 * int(point["student.layers"])


def make(folder: Path, known: list[Trial] | None = None, others: list[Trial] | None = None, **about: Any) -> Proposals:
    ended: list[Trial] = about.get("ended", [])
    return Proposals(TuneConfig(seed=3), about.get("space", SPACE), size, str(folder), known or [], others or [], ended.append)


def epoch(number: int, agreement: float) -> dict[str, float]:
    return {"epoch": number, "agreement": agreement}


def test_a_trial_is_written_down_before_it_starts_and_is_within_the_limits(tmp_path: Path) -> None:
    proposals = make(tmp_path)
    numbers = [proposals.suggest(f"ray-{i}")["number"] for i in range(12)]
    assert numbers == list(range(12))
    trials = read_trials(str(tmp_path))
    assert [trial.number for trial in trials] == numbers
    assert all(trial.point["student.layers"] <= 6 and trial.parameters == size(trial.point) for trial in trials)
    assert {trial.state for trial in trials} == {"running"}


def test_a_space_without_a_possible_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is possible; the last one: too deep"):
        make(tmp_path, space={"student.layers": IntDistribution(7, 9)}).suggest("ray-0")


def test_how_a_trial_ends_is_noted_and_learnt_from(tmp_path: Path) -> None:
    ended: list[Trial] = []
    proposals = make(tmp_path, ended=ended)
    for name in "abcde":
        proposals.suggest(name)
        proposals.on_trial_result(name, {"latency_ms": 2.0})
    proposals.on_trial_result("a", epoch(1, 0.5))
    assert read_trial(str(tmp_path), 0).epochs == [epoch(1, 0.5)]
    proposals.on_trial_complete("a", epoch(2, 0.7) | {"state": "finished", "done": True})
    proposals.on_trial_complete("b", epoch(1, 0.1))
    proposals.on_trial_complete("c", {"state": "refused", "reason": "9 ms a comment"})
    proposals.on_trial_complete("d", error=True)
    proposals.on_trial_complete("e")
    assert [(trial.number, trial.state) for trial in ended] == [(0, "finished"), (1, "stopped"), (2, "refused"), (3, "failed")]
    assert [trial.reason for trial in ended] == [None, None, "9 ms a comment", "its process died; --verbose shows its log"]
    assert proposals.trials[4].state == "running"
    complete = [trial for trial in proposals._study.trials if trial.state == TrialState.COMPLETE]
    sizes = [float(proposals.trials[i].parameters) for i in range(2)]
    assert [trial.values for trial in complete] == [[0.7, sizes[0], 2.0], [0.1, sizes[1], 2.0]]


def test_a_search_goes_on_with_what_was_interrupted_and_knows_the_rest(tmp_path: Path) -> None:
    done = Trial(
        number=0, point={"student.layers": 2}, state="finished", parameters=2000, latency_ms=1.0, epochs=[epoch(1, 0.6)]
    )
    left = Trial(number=1, point={"student.layers": 5}, parameters=5000, latency_ms=1.5, epochs=[epoch(1, 0.4)])
    other_space = done.model_copy(update={"point": {"student.width": 64}})
    proposals = make(tmp_path, [done, left], [done.model_copy(), other_space])
    assert [trial.values for trial in proposals._study.trials] == [[0.6, 2000.0, 1.0]] * 2
    assert proposals.suggest("a") == {"number": 1}
    assert proposals.trials[1].epochs == [epoch(1, 0.4)]
    assert proposals.suggest("b") == {"number": 2}


def test_a_warm_start_learns_from_another_search_and_draws_other_points(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space: dict[str, BaseDistribution] = {
        "student.layers": IntDistribution(1, 6),
        "train.learning_rate": FloatDistribution(0, 1),
    }
    first = make(tmp_path / "first", space=space)
    for name in "abc":
        first.suggest(name)
        first.on_trial_result(name, {"latency_ms": 2.0})
        first.on_trial_complete(name, epoch(1, 0.5) | {"state": "finished"})
    elsewhere = Trial(
        number=3, point={"student.width": 9}, state="finished", parameters=1, latency_ms=1.0, epochs=[epoch(1, 0.5)]
    )
    with caplog.at_level("INFO"):
        second = make(tmp_path / "second", space=space, others=[*first.trials.values(), elsewhere])
    assert "learnt from 3 of 4 trials" in caplog.text
    for name in "abc":
        second.suggest(name)
    rates = {trial.point["train.learning_rate"] for each in (first, second) for trial in each.trials.values()}
    assert len(rates) == 6


def test_an_epoch_counts_once_and_the_kept_one_decides() -> None:
    trial = Trial(number=0, point={}, parameters=1024)
    assert trial.agreement is None
    for row in (epoch(1, 0.5), epoch(2, 0.6), epoch(2, 0.9), epoch(3, 0.4)):
        trial.note(row)
    assert [row["epoch"] for row in trial.epochs] == [1, 2, 3]
    assert trial.agreement == 0.6
    assert trial.score(0.5) == pytest.approx(60 - 0.5 * 10)


@given(st.floats(0, 1), st.integers(1, 10**10), st.floats(0, 5))
def test_half_a_student_may_lose_the_points_of_a_halving(agreement: float, parameters: int, points: float) -> None:
    whole = Trial(number=0, point={}, parameters=2 * parameters, epochs=[epoch(1, agreement)])
    half = Trial(number=1, point={}, parameters=parameters, epochs=[epoch(1, agreement)])
    assert half.score(points) - whole.score(points) == pytest.approx(points, abs=1e-6)


@pytest.mark.parametrize(("score", "action"), [(40.0, TrialScheduler.STOP), (80.0, TrialScheduler.CONTINUE)])
def test_early_stopping_stops_the_worse_one(score: float, action: str) -> None:
    config = ClusterSettings.model_validate({"tune": {"points_per_halving": 0}})
    known = [Trial(number=i, point={}, state="finished", parameters=1, epochs=[epoch(1, i / 10)]) for i in (5, 6, 7)]
    scheduler, trial = asha(config, known), SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"epoch": 1, "score": score}) == action


def test_early_stopping_remembers_the_trials_of_before_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.search.tuner.REDUCTION", 2)
    config = ClusterSettings.model_validate({"train": {"epochs": 4}, "tune": {"points_per_halving": 0}})
    known = [
        Trial(number=i, point={}, state="finished", parameters=1000, epochs=[epoch(1, share), epoch(2, share)])
        for i, share in enumerate((0.5, 0.6, 0.7))
    ]
    rungs = dict(asha(config, known)._brackets[0]._rungs)
    assert sorted(rungs[1].values()) == pytest.approx([50, 60, 70])
    assert sorted(rungs[2].values()) == pytest.approx([50, 60, 70])
    save(str(tmp_path), known[0])
    assert read_trials(str(tmp_path)) == known[:1]
