"""How a search begins; that it goes on and ends is in tests/integration/test_tune.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from cluster.config import ClusterSettings
from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from tune.config import TuneConfig
from tune.search import search as driver
from tune.search.trials import Trial, save


@pytest.fixture
def begin(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins a search with some settings, up to its first trial."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("start_ray", "require_room", "concurrent_trials"):
        monkeypatch.setattr(driver, name, lambda *_: 1)
    monkeypatch.setattr(driver, "_run", stop)

    def begin(**tune: Any) -> None:
        config = ClusterSettings.model_validate({"out": str(tmp_path), "tune": tune})
        with pytest.raises(KeyboardInterrupt):
            driver.search(config, shards.folder, str(tmp_path / "search"))

    return begin


def runs(tmp_path: Path) -> list[str]:
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiments = [each.experiment_id for each in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments)]


def test_a_search_without_trials_goes_on_and_with_other_settings_is_begun_anew(begin: Any, tmp_path: Path) -> None:
    begin(max_params=1)
    begin(max_params=1)
    assert runs(tmp_path) == ["KILLED"]
    begin(max_params=1_000_000)
    assert runs(tmp_path) == ["KILLED", "KILLED"]


def test_a_search_with_trials_is_not_written_over(begin: Any, tmp_path: Path) -> None:
    begin(max_params=1)
    save(str(tmp_path / "search"), Trial(number=0, point={}, parameters=1))
    begin(max_params=1)
    with pytest.raises(UserError, match=r"another search .its tune differ"):
        begin(max_params=2)


def test_a_missing_search_to_learn_from_is_refused_before_anything_begins(begin: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no search in .*nowhere to learn from"):
        begin(warm_start=[str(tmp_path / "nowhere")])
    assert not list(tmp_path.iterdir())


def test_the_best_finished_trial_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[str] = []
    monkeypatch.setattr(driver, "register_best", lambda _, model, *__, **___: registered.append(model))
    trials = [
        Trial(
            number=number,
            point={},
            state=state,
            parameters=1,
            model=f"models:/{number}",
            epochs=[{"epoch": 1, "agreement": share}],
        )
        for number, (state, share) in enumerate([("finished", 0.5), ("finished", 0.8), ("stopped", 0.9), ("finished", 0.7)])
    ]
    driver._register_best(trials, TuneConfig(), SimpleNamespace(uri="", run_id=""), "task")
    assert registered == ["models:/1"]


def test_trials_that_start_from_a_student_have_its_shape(shards: Shards, tmp_path: Path) -> None:
    config = ClusterSettings.model_validate({"out": str(tmp_path), "train": {"init": "pruned"}})
    with pytest.raises(UserError, match=r"the shape of pruned: give a --space without student\.layers"):
        driver.search(config, shards.folder, str(tmp_path / "search"))
