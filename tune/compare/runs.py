"""Students' runs as MLflow holds them: what was set, what came of it, and how validation went."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mlflow.entities import Experiment, Run
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError

from pipeline.base.errors import UserError
from pipeline.base.tracking import KIND, REASON, STATE

PARENTS = ("search", "chain", "ladder", "growth")  # kinds of runs that have runs of students under them
ACCURACY, EPOCH = "validation_answer_accuracy", "epoch"
STATES = {"FINISHED": "finished", "KILLED": "interrupted", "FAILED": "failed"}  # of a run that has not said so itself
PAGE = 1000  # runs asked for at once


@dataclass(frozen=True)
class StudentRun:
    """One student's training.

    Attributes:
        id: of the MLflow run.
        name: of the MLflow run.
        state: finished, stopped (early, by a search), interrupted (by a signal), failed, refused, or running.
        reason: why it failed or was refused; may be empty.
        params: what was set, by dotted name.
        metrics: the last value of each finite metric.
        curve: (epoch, share of validation answers that are the teacher's, 0..1), in order of training.
    """

    id: str
    name: str
    state: str
    reason: str
    params: dict[str, str]
    metrics: dict[str, float]
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Found:
    """The runs to compare, and where they are from.

    Attributes:
        title: what they are of: the search or the experiment, by name.
        source: the store's address, without credentials.
        search: the id of the search's run; None where the runs are all of an experiment.
        runs: the students', oldest first.
    """

    title: str
    source: str
    search: str | None
    runs: list[StudentRun]


def read_runs(uri: str, experiment: str, search: str | None = None) -> Found:
    """Reads every student's run of an experiment, or every trial of a search.

    Args:
        search: id or name of a search's run; None takes the whole experiment.

    Raises:
        UserError: the store cannot be reached, or has no such experiment, search, or students.
    """
    source = _without_credentials(uri)
    _require_database(uri)
    try:
        client = MlflowClient(uri)
        with _impatient():
            known = client.search_experiments()
        parent = _find_search(client, known, experiment, search) if search else None
        home = parent.info.experiment_id if parent else _find_experiment(known, experiment, source).experiment_id
        wanted = f"tags.`{KIND}` = 'student'" + (
            f" and tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}'" if parent else ""
        )
        runs = [_student_run(client, run) for run in _search(client, home, wanted)]
    except (MlflowException, SQLAlchemyError, OSError) as error:  # MLflow passes a database's own errors through
        said = str(error).replace(uri.rstrip("/"), source.rstrip("/")).splitlines()[0]
        raise UserError(f"MLflow at {source} cannot be read: {said}") from error
    title = f"the {parent.data.tags[KIND]} {parent.info.run_name}" if parent else f"the experiment {experiment}"
    if not runs:
        raise UserError(f"MLflow at {source} has no student in {title}: train some first, or name another --experiment")
    return Found(title, source, parent.info.run_id if parent else None, runs)


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _require_database(uri: str) -> None:
    """Refuses a SQLite file that is not there: MLflow would make an empty one."""
    if not uri.startswith("sqlite:///"):
        return
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not (os.path.isfile(path) and os.path.getsize(path)):
        raise UserError(f"no MLflow database at {path}: train a student first, or name the store with --out or --uri")


@contextmanager
def _impatient() -> Iterator[None]:
    """Two more tries of a server, unless the user has said how many: MLflow's seven take minutes."""
    name = MLFLOW_HTTP_REQUEST_MAX_RETRIES.name
    given = os.environ.get(name)
    os.environ[name] = given or "2"
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _find_experiment(known: list[Experiment], name: str, source: str) -> Experiment:
    for each in known:
        if each.name == name:
            return each
    names = [each.name for each in known]
    near = get_close_matches(name, names) or names[:10]
    raise UserError(f"MLflow at {source} has no experiment {name!r}; it has {', '.join(map(repr, near))}")


def _find_search(client: MlflowClient, known: list[Experiment], experiment: str, search: str) -> Run:
    """The search's run: by id in any experiment, by name in the given one."""
    for home in known:
        found = [run for kind in PARENTS for run in _search(client, home.experiment_id, f"tags.`{KIND}` = '{kind}'")]
        by_id = [run for run in found if run.info.run_id == search]
        if by_id:
            return by_id[0]
        by_name = [run for run in found if run.info.run_name == search and home.name == experiment]
        if len(by_name) == 1:
            return by_name[0]
        if by_name:
            ids = ", ".join(run.info.run_id for run in by_name)
            raise UserError(f"{len(by_name)} searches are named {search!r}: name one by its id, of {ids}")
    raise UserError(f"no search {search!r} in experiment {experiment!r}: give the name or the id of its run in MLflow")


def _search(client: MlflowClient, experiment_id: str, wanted: str) -> Iterator[Run]:
    """All matching runs, page by page, oldest first."""
    token: str | None = None
    while True:
        page: Any = client.search_runs(
            [experiment_id], wanted, max_results=PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _student_run(client: MlflowClient, run: Run) -> StudentRun:
    tags, metrics = run.data.tags, run.data.metrics
    return StudentRun(
        id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        state=tags.get(STATE) or STATES.get(run.info.status, "running"),
        reason=tags.get(REASON, ""),
        params=dict(run.data.params),
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        curve=_curve(client, run.info.run_id) if ACCURACY in metrics else (),
    )


def _curve(client: MlflowClient, run_id: str) -> tuple[tuple[float, float], ...]:
    """Validation accuracy by epoch. A training that went on from a checkpoint logs some steps again: the last stays."""
    epochs = {metric.step: metric.value for metric in client.get_metric_history(run_id, EPOCH)}
    shares = {metric.step: metric.value for metric in client.get_metric_history(run_id, ACCURACY)}
    return tuple((epochs.get(step, place), shares[step]) for place, step in enumerate(sorted(shares), 1))
