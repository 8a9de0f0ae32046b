from __future__ import annotations

import logging

import pytest
import ray

from pipeline.base.capacity import fitting, require_room
from pipeline.base.errors import UserError


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_what_this_machine_never_has_is_refused_with_the_arithmetic() -> None:
    require_room("training", 4, {"CPU": 0.5, "GPU": 0})
    with pytest.raises(UserError, match="training takes 3 × 1 = 3 CPU, and there are 2"):
        require_room("training", 3, {"CPU": 1.0})
    with pytest.raises(UserError, match="a trial takes 1 × 1 = 1 GPU, and there are 0"):
        require_room("a trial", 1, {"CPU": 1.0, "GPU": 1})
    with pytest.raises(UserError, match=r"prediction takes 2 × 1 \+ 0\.5 beside = 2\.5 CPU, and there are 2"):
        require_room("prediction", 2, {"CPU": 1.0}, {"CPU": 0.5})
    with pytest.raises(UserError, match=r"2 × 0 \+ 1 beside = 1 teacher"):
        require_room("prediction", 2, {"CPU": 0.5}, {"teacher": 1.0})


def test_as_many_as_fit_and_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    here, spot = {"CPU": 14.0, "GPU": 4.0}, {"CPU": 2.0, "spot": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 4.0, "spot": 1.0})
    nodes = [{"Alive": True, "Resources": here}, {"Alive": True, "Resources": spot}, {"Alive": False, "Resources": here}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert fitting({"CPU": 1, "GPU": 0}, {}) == 16
    assert fitting({"CPU": 1, "GPU": 0, "spot": 0.001}, {}) == 2
    assert fitting({"CPU": 1, "GPU": 0.5}, {"GPU": 1, "CPU": 2}) == 6
    assert fitting({"CPU": 1, "GPU": 1}, {"GPU": 4}) == 1


def test_a_cluster_may_grow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with caplog.at_level(logging.WARNING):
        require_room("training", 3, {"CPU": 1.0})
    assert "waiting for the cluster to grow" in caplog.text
