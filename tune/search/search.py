"""`retort tune`: many trainings on the same shards, proposed, stopped early and compared. What runs here is the driver.

Every trial has a folder, and its record there is written before it starts, after each epoch and at its end. A search that
was killed begins anew with what these records say: nothing of Ray Tune's own state is read back.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import torch
import yaml
from mlflow.entities import RunStatus

from pipeline.base import storage
from pipeline.base.capacity import require_room
from pipeline.base.errors import UserError
from pipeline.base.run import find_run, tracked_run
from pipeline.base.runtime import start_ray
from pipeline.base.tracking import Tracking, tracking_uri
from pipeline.shards.manifest import Shards, open_shards
from student.config import student_shape, task_shape
from student.data.unpack import unpack
from student.model.checkpoint import load_student
from student.model.model import Student
from student.registry.mlflow_model import log_report, register_best
from student.train.loop import Training
from student.train.train import BEGUN, CHECKPOINTS
from tune.compare.page import Comparison, compare_runs
from tune.config import TuneConfig, TuneSettings
from tune.search.proposals import Proposals
from tune.search.space import Point, Space, configure, distributions, read_space
from tune.search.trial import Search
from tune.search.trials import Trial, ended, folder_of, read_trials, save
from tune.search.tuner import asha, concurrent_trials, run_tuner

log = logging.getLogger(__name__)

CONFIG, FILE = "config.yaml", "search.json"
STATUS = {
    "finished": RunStatus.FINISHED,
    "stopped": RunStatus.KILLED,
    "refused": RunStatus.KILLED,
    "failed": RunStatus.FAILED,
}


def search(config: TuneSettings, shards_folder: str, folder: str) -> Comparison:
    """Runs a search, or what is left of it, and writes its page; returns what the page shows.

    Args:
        folder: of the search; each trial has a folder inside.

    Raises:
        UserError: the shards or the space are unusable, or the folder holds another search.
        Stopped: a signal ended it early.
    """
    shards, space = open_shards(shards_folder), read_space(config.tune.space)
    shapes = [key for key in space.root if key.startswith("student.") and key != "student.dropout"]
    if config.train.init and shapes:
        raise UserError(f"every trial has the shape of {config.train.init}: give a --space without {', '.join(shapes)}")
    identity = _identity(config, shards, space)
    known, others = read_trials(folder), [trial for earlier in config.tune.warm_start for trial in _earlier(earlier)]
    _forget_without_trials(folder, identity, known)
    find_run(folder, FILE, identity, "search")  # another one is better refused before Ray starts
    left = config.tune.trials - len(ended(known))
    if left > 0:
        _require_whole(config.train.init, shards)
        start_ray()
        require_room("a trial", config.train.fewest_workers, config.train.resources)
    else:
        log.info("%s already holds this search", folder)
    start = partial(_start_run, config, identity, folder)
    with tracked_run(folder, FILE, identity, "search", start, shards_folder=shards_folder) as tracking:
        if left > 0:
            job = Search(_for_trials(config, tracking.uri), shards_folder, folder, tracking.run_id)
            known = _run(job, _proposals(job, shards, space, known, others, tracking), left)
        comparison = compare_runs(tracking.uri, config.tracking.experiment, folder, tracking.run_id)
        _register_best(known, config.tune, tracking, identity["shards"]["task_name"])
        log_report(tracking.uri, tracking.run_id, folder, "search")
        return comparison


def _require_whole(init: str | None, shards: Shards) -> None:
    """Refuses what no trial could train on or start from.

    Raises:
        UserError: the shards or the student that all trials start from are damaged.
    """
    unpack(shards)
    if init:
        load_student(init)


def _run(job: Search, proposals: Proposals, left: int) -> list[Trial]:
    """Runs what is left of a search; returns all its trials."""
    config, trials = job.base, proposals.trials
    for trial in ended(trials.values()):  # a kill may have come between its end and this
        storage.delete(storage.join(folder_of(job.folder, trial.number), "student", CHECKPOINTS))
    at_once = concurrent_trials(config.tune, config.train)
    log.info("%s trials to run, %s at once, of up to %s epochs each", left, min(at_once, left), config.train.epochs)
    try:
        run_tuner(job, proposals, asha(config, list(trials.values())))
    except BaseException:
        for run in (_begun(job, trial) for trial in trials.values() if trial.state == "running"):
            if run:
                run.end(RunStatus.KILLED)
        raise
    return list(trials.values())


def _register_best(trials: list[Trial], config: TuneConfig, tracking: Tracking, task: str) -> None:
    """Registers the finished student with the best score, as the newest version that the alias `best` stands for."""
    finished = [trial for trial in trials if trial.state == "finished" and trial.model]
    if not finished:
        log.warning("no trial finished: there is no student to register")
        return
    best = max(finished, key=lambda trial: trial.score(config.points_per_halving))
    name, about = f"retort-{task}", f"{best.name} of the search {tracking.run_id}"
    register_best(tracking.uri, str(best.model), name, description=about)
    log.info("best: %s, models:/%s@best in MLflow", best.name, name)


def begun(folder: str) -> tuple[str, str]:
    """What a search was begun with: the file of its configuration, and the folder of its shards.

    Raises:
        UserError: there is no search in the folder.
    """
    path = storage.join(folder, FILE)
    if not storage.exists(path):
        raise UserError(f"no search in {folder} to go on with: --out must be the folder it was begun in")
    return storage.join(folder, CONFIG), storage.read_json(path)["shards_folder"]


def _identity(config: TuneSettings, shards: Shards, space: Space) -> dict[str, Any]:
    """What makes a search this one and no other. How many trials it has may change from call to call."""
    settings = config.tune.model_dump(mode="json", include={"max_params", "max_latency_ms", "points_per_halving"})
    return {
        "space": space.model_dump(mode="json"),
        "tune": settings,
        "student": student_shape(shards.compiled.task, config.student).model_dump(mode="json"),
        "train": config.train.recipe() | ({"init": config.train.init} if config.train.init else {}),
        "shards": shards.manifest.model_dump(mode="json", include={"task_name", "rows", "digest"}),
    }


def _forget_without_trials(folder: str, identity: dict[str, Any], known: list[Trial]) -> None:
    """A search that never proposed a trial may give way to another."""
    path = storage.join(folder, FILE)
    if not known and storage.exists(path) and any(storage.read_json(path).get(key) != value for key, value in identity.items()):
        storage.delete(path)


def _start_run(config: TuneSettings, identity: dict[str, Any], folder: str) -> Tracking:
    uri = tracking_uri(config.tracking.uri, config.out or ".")
    storage.write_text(storage.join(folder, CONFIG), yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return Tracking.start(uri, config.tracking.experiment, identity["shards"]["task_name"], identity, "search")


def _for_trials(config: TuneSettings, uri: str) -> TuneSettings:
    """The configuration as trials need it: they work in other folders, and share the machine's CPUs with each other."""
    workers = concurrent_trials(config.tune, config.train) * config.train.most_workers
    threads = config.train.threads or max(1, (os.cpu_count() or 1) // workers)
    train = config.train.model_copy(update={"threads": threads})
    return config.model_copy(update={"train": train, "tracking": config.tracking.model_copy(update={"uri": uri})})


def _proposals(
    job: Search, shards: Shards, space: Space, known: list[Trial], others: list[Trial], tracking: Tracking
) -> Proposals:
    task, config = shards.compiled.task, job.base

    def size(point: Point) -> int:
        changed = configure(config, task_shape(task), point)
        shape = Training.of(student_shape(task, changed.student), changed.train, shards).shape
        with torch.device("meta"):
            parameters = sum(Student(shape).parameter_counts().values())
        if config.tune.max_params and parameters > config.tune.max_params:
            raise UserError(f"{parameters:,} parameters, {config.tune.max_params:,} allowed")
        return parameters

    return Proposals(config.tune, distributions(space), size, job.folder, known, others, partial(_close, job, tracking))


def _earlier(folder: str) -> list[Trial]:
    trials = read_trials(storage.absolute(folder))
    if not trials:
        raise UserError(f"no search in {folder} to learn from: give the folder that holds its {FILE}")
    return trials


def _begun(job: Search, trial: Trial) -> Tracking | None:
    """A trial's run in MLflow, once its training has begun."""
    begun = storage.join(folder_of(job.folder, trial.number), "student", BEGUN)
    return Tracking(**storage.read_json(begun)["mlflow"]) if storage.exists(begun) else None


def _close(job: Search, tracking: Tracking, trial: Trial) -> None:
    """Writes down how a trial ended: in its folder, in MLflow, where it has a run even if it never began, and in the log."""
    run = _begun(job, trial)
    if run is None:
        run = Tracking.start(tracking.uri, job.base.tracking.experiment, trial.name, trial.point, "student", tracking.run_id)
    run.end(STATUS[trial.state], trial.state, trial.reason)
    trial.run_id = run.run_id
    save(job.folder, trial)
    reached = "" if trial.agreement is None else f", agreement {100 * trial.agreement:.1f} %"
    why = f": {trial.reason}" if trial.reason else ""
    log.info("%s %s%s, %.2f M parameters%s", trial.name, trial.state, reached, trial.parameters / 1e6, why)
