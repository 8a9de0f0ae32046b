"""MLflow: one run a training, those of a search under the search's own. Only drivers write, so workers need no way to it."""

from __future__ import annotations

import logging
import os
import re
import time
from types import TracebackType
from typing import Any, Literal

from mlflow.entities import Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.signals import Stopped
from pipeline.base.version import git_commit


def tracking_uri(configured: str | None, out: str) -> str:
    """The configured store, else $MLFLOW_TRACKING_URI, else mlflow.db in the run's folder.

    Raises:
        UserError: the folder is a bucket, which cannot hold a database, or the store's URI holds credentials.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        storage.refuse_credentials(uri)
        return uri
    if storage.is_uri(out):
        raise UserError(f"MLflow's database cannot lie in {out}: set tracking.uri to a server or to sqlite:///…")
    return f"sqlite:///{os.path.abspath(out)}/mlflow.db"


log = logging.getLogger(__name__)

KIND, STATE, REASON = "retort.kind", "retort.state", "retort.reason"  # tags
ENDS = {RunStatus.FINISHED: "finished", RunStatus.KILLED: "interrupted", RunStatus.FAILED: "failed"}
WRITE_EVERY = 5.0  # seconds between two writes of a training's metrics
MOST_METRICS, MOST_PARAMS = 1000, 100  # MLflow's limits for one call


FIELD = "test/field/"  # what the metric of an output field begins with
LONGEST_METRIC = 250  # characters: MLflow's limit

MetricsRow = tuple[int, dict[str, float]]  # a step and its metrics


def field_metric(name: str) -> str:
    """The metric of an output field. What MLflow refuses in names of metrics becomes its code: `:24:` is a dollar sign."""
    return (FIELD + re.sub(r"[^\w -]", lambda found: f":{ord(found[0]):X}:", name))[:LONGEST_METRIC]


def field_of(metric: str) -> str:
    """The output field that such a metric is of."""
    return re.sub(":([0-9A-F]+):", lambda found: chr(int(found[1], 16)), metric.removeprefix(FIELD))


class Tracking:
    """One MLflow run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = MlflowClient(uri)

    @staticmethod
    def start(
        uri: str,
        experiment: str,
        name: str,
        parameters: dict[str, Any],
        kind: Literal["extraction", "student", "search", "chain", "ladder", "growth", "scale"],
        parent: str | None = None,
    ) -> Tracking:
        """Starts a run, in a new experiment if need be.

        Args:
            parent: the run it belongs to. It has one run of a name: what a killed process began is gone on with.

        Raises:
            UserError: the store cannot be reached.
        """
        if uri.startswith("sqlite:///"):
            os.makedirs(os.path.dirname(uri.removeprefix("sqlite:///")) or ".", exist_ok=True)
        try:
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            id_ = found.experiment_id if found else client.create_experiment(experiment, _artifacts(uri))
            run = _child(client, id_, parent, name) or client.create_run(id_, run_name=name, tags=_tags(kind, parent))
        except MlflowException as error:
            raise UserError(f"MLflow at {uri} cannot be used: {error}") from error
        params = [Param(key, str(value)) for key, value in _flatten(parameters).items()]
        for start in range(0, len(params), MOST_PARAMS):
            client.log_batch(run.info.run_id, params=params[start : start + MOST_PARAMS])
        return Tracking(uri, run.info.run_id)

    @staticmethod
    def reopen(uri: str, run_id: str) -> Tracking:
        """Goes on with a run.

        Raises:
            UserError: the store does not have it, or cannot be reached.
        """
        try:
            MlflowClient(uri).update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        except MlflowException as error:
            raise UserError(f"MLflow at {uri} does not have run {run_id} any more: {error}") from error
        return Tracking(uri, run_id)

    @property
    def place(self) -> dict[str, str]:
        """What `reopen` needs."""
        return {"uri": self.uri, "run_id": self.run_id}

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends the run: as finished, as killed where a signal asked for it, else as failed."""
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        self.end(RunStatus.FINISHED if kind is None else RunStatus.KILLED if stopped else RunStatus.FAILED)

    def log(self, rows: list[MetricsRow]) -> None:
        """Logs metrics of several steps at once."""
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, row in rows for key, value in row.items()]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + MOST_METRICS])

    def log_missing(self, rows: list[MetricsRow]) -> None:
        """Logs those rows that a killed driver did not: a row is there if its first metric is at its step."""
        if rows:
            there = {metric.step for metric in self._client.get_metric_history(self.run_id, next(iter(rows[0][1])))}
            self.log([(step, row) for step, row in rows if step not in there])

    def end(self, status: RunStatus = RunStatus.FINISHED, state: str | None = None, reason: str | None = None) -> None:
        """Closes the run."""
        tags = [RunTag(STATE, state or ENDS[status])] + ([RunTag(REASON, reason)] if reason else [])
        self._client.log_batch(self.run_id, tags=tags)
        self._client.set_terminated(self.run_id, RunStatus.to_string(status))


class Writer:
    """Gathers rows of metrics and writes them a few seconds' worth at a time, as each write costs the same whatever it holds.

    A store that cannot be reached must not end a training: what it does not take is offered again with the next rows.
    """

    def __init__(self, tracking: Tracking) -> None:
        self._tracking, self._rows, self._written = tracking, list[MetricsRow](), time.monotonic()

    def add(self, rows: list[MetricsRow]) -> None:
        """Takes rows, and writes once in a while."""
        self._rows += rows
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Writes what was gathered."""
        try:
            self._tracking.log(self._rows)
            self._rows = []
        except MlflowException as error:
            log.warning("steps %s to %s are not in MLflow yet: %s", self._rows[0][0], self._rows[-1][0], error)
        self._written = time.monotonic()


def _child(client: MlflowClient, experiment_id: str, parent: str | None, name: str) -> Run | None:
    if parent is None:
        return None
    runs = client.search_runs([experiment_id], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and attributes.run_name = '{name}'")
    return runs[0] if runs else None


def _tags(kind: str, parent: str | None) -> dict[str, str]:
    tags = {KIND: kind, MLFLOW_SOURCE_NAME: "retort", MLFLOW_GIT_COMMIT: git_commit(), MLFLOW_PARENT_RUN_ID: parent}
    return {name: value for name, value in tags.items() if value}


def _artifacts(uri: str) -> str | None:
    """Beside a local database; a server knows its own place."""
    if not uri.startswith("sqlite:///"):
        return None
    return "file://" + os.path.join(os.path.dirname(os.path.abspath(uri.removeprefix("sqlite:///"))), "mlflow-artifacts")


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
