from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

import pipeline.base.tracking
from pipeline.base.errors import UserError
from pipeline.base.tracking import MetricsRow, Tracking, Writer, tracking_uri


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


def test_credentials_in_the_stores_uri_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hush@mlflow.example.com")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD"):
        tracking_uri(None, "out")


def test_where_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri("http://server", "s3://bucket/run") == "http://server"
    assert tracking_uri(None, str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=r"tracking\.uri"):
        tracking_uri(None, "s3://bucket/run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert tracking_uri(None, "s3://bucket/run") == "http://other"


def test_rows_are_written_together_and_offered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = Tracking.start(f"sqlite:///{tmp_path}/mlflow.db", "tests", "a run", {}, "student")
    writer, calls, clock = Writer(tracking), list[int](), [time.monotonic()]
    monkeypatch.setattr(pipeline.base.tracking.time, "monotonic", lambda: clock[0])

    def log(rows: list[MetricsRow]) -> None:
        calls.append(len(rows))
        if len(calls) == 1:
            raise MlflowException("no way to the store")

    monkeypatch.setattr(tracking, "log", log)
    for step in range(4):
        writer.add([(step, {"loss": 1.0})])
        clock[0] += 2.0
    assert calls == [4]
    writer.write()
    writer.write()
    assert calls == [4, 4, 0]


def test_a_search_has_one_run_of_a_trials_name_and_says_how_it_ended(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    search = Tracking.start(uri, "tests", "search", {}, "search")
    first, again, other = (
        Tracking.start(uri, "tests", name, {"seed": 0}, "student", search.run_id) for name in ("trial-0", "trial-0", "trial-1")
    )
    assert first.run_id == again.run_id != other.run_id
    other.end(RunStatus.KILLED, "refused", "too slow")
    run = MlflowClient(uri).get_run(other.run_id)
    tags = {name: run.data.tags[name] for name in ("mlflow.parentRunId", "retort.kind", "retort.state", "retort.reason")}
    assert tags == {
        "mlflow.parentRunId": search.run_id,
        "retort.kind": "student",
        "retort.state": "refused",
        "retort.reason": "too slow",
    }
    assert run.info.status == "KILLED"
