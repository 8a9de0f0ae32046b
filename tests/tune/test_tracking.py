from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from tune.tracking import Tracking, tracking_uri


def test_a_run_keeps_parameters_every_step_and_its_end(tmp_path: Path) -> None:
    uri = tracking_uri(None, str(tmp_path / "run"))
    tracking = Tracking.start(uri, "tests", "a run", {"student": {"layers": 2}, "seed": 0}, "student")
    tracking.log([(step, {"loss": 1 / step, "kl": 0.5}) for step in range(1, 701)])
    tracking.end()
    client = MlflowClient(uri)
    run = client.get_run(tracking.run_id)
    assert run.data.params == {"student.layers": "2", "seed": "0"}
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(tracking.run_id, "loss")
    assert [(m.step, m.value) for m in history][:2] == [(1, 1.0), (2, 0.5)]
    assert len(history) == 700


def test_where_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri("http://server", "s3://bucket/run") == "http://server"
    assert tracking_uri(None, str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=r"tracking\.uri"):
        tracking_uri(None, "s3://bucket/run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert tracking_uri(None, "s3://bucket/run") == "http://other"
