"""What one trial of a search does: the stages `train` and `evaluate`, in an actor of Ray Tune beside the search's driver."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from pipeline.base import storage
from pipeline.base.capacity import ray_options
from pipeline.base.runtime import MALLOC
from pipeline.base.signals import Stopped
from pipeline.base.version import check_code_version
from pipeline.shards.manifest import open_shards
from student.config import student_shape, task_shape
from student.evaluate.evaluate import measure, track
from student.evaluate.speed import latency_before_training
from student.train.loop import Training
from student.train.train import CHECKPOINTS, Child, Watcher, train
from tune.config import TuneSettings
from tune.search.space import configure
from tune.search.trials import Trial, folder_of, read_trial

BEAT = 2.0  # seconds after which a trial without news lets Ray Tune look whether to stop it
POLL = 0.3  # seconds between two looks whether to stop


@dataclass(frozen=True)
class Search:
    """What all trials of a search share.

    Attributes:
        base: the configuration that the trials' points change.
        shards: folder of the logit shards.
        folder: of the search.
        run_id: of the search in MLflow.
    """

    base: TuneSettings
    shards: str
    folder: str
    run_id: str


class TrialActor(tune.Trainable):
    """One trial. Its results are those of its job, one a call of `step`."""

    def setup(self, config: dict[str, Any], search: Search) -> None:
        """Starts the trial's work in a thread, so that it can be stopped within an epoch."""
        check_code_version()
        self._job = _Job(search, read_trial(search.folder, config["number"]))
        self._thread = threading.Thread(target=self._job.run, daemon=True, name="trial")
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """The next result; an empty one where there is none yet."""
        try:
            return self._job.results.get(timeout=BEAT)
        except queue.Empty:
            return {}

    def cleanup(self) -> None:
        """Ends the trial's training, whose workers are free when this returns."""
        self._job.stop.set()
        self._thread.join()
        self._job.tidy()


class _Job:
    """The work of one trial."""

    def __init__(self, search: Search, trial: Trial) -> None:
        self._search, self._trial = search, trial
        self._folder = folder_of(search.folder, trial.number)
        shards = open_shards(search.shards)
        self._config = configure(search.base, task_shape(shards.compiled.task), trial.point)
        self._training = Training.of(student_shape(shards.compiled.task, self._config.student), self._config.train, shards)
        self.results: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stop = threading.Event()

    def run(self) -> None:
        """Does it all; a failure is a result too."""
        with suppress(Stopped):
            try:
                self._run()
            except Exception as error:
                self._put({"state": "failed", "reason": reason_of(error), "done": True})

    def tidy(self) -> None:
        """Deletes what only a trial that goes on some day needs."""
        if read_trial(self._search.folder, self._trial.number).state != "running":
            storage.delete(storage.join(self._folder, "student", CHECKPOINTS))

    def _run(self) -> None:
        latency = self._on_worker(latency_before_training, self._training, self._search.shards)
        limit = self._search.base.tune.max_latency_ms
        if limit and latency > limit:
            reason = f"{latency:.2f} ms a comment, {limit:g} allowed"
            return self._put({"state": "refused", "reason": reason, "latency_ms": latency, "done": True})
        self._put({"latency_ms": latency})
        student, report = storage.join(self._folder, "student"), storage.join(self._folder, "report")
        child, watcher = Child(self._trial.name, self._search.run_id), Watcher(self.stop, self._epoch_ended)
        trained = train(self._config, self._search.shards, student, child, watcher)
        figures = self._on_worker(measure, self._config.floors, self._search.shards, student, report)
        model = track(figures, student, report)
        return self._put(epoch_result(trained.epochs[-1]) | {"state": "finished", "model": model, "done": True})

    def _epoch_ended(self, row: dict[str, Any]) -> None:
        """The last epoch's measures wait for the evaluation, so that a trial is not stopped before it."""
        if row["epoch"] < self._config.train.epochs:
            self._put(epoch_result(row))

    def _put(self, result: dict[str, Any]) -> None:
        self._trial.note(result)
        self.results.put(result | {"score": self._trial.score(self._search.base.tune.points_per_halving)})

    def _on_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function where a worker of the training would run.

        Raises:
            Stopped: the search ends the trial.
        """
        config = self._config.train
        task = ray.remote(function).options(
            **ray_options(config.resources),
            scheduling_strategy="DEFAULT",  # outside of the trial's own few resources
            runtime_env={"env_vars": MALLOC | {"OMP_NUM_THREADS": str(config.threads_per_worker)}},
        )
        coming = task.remote(*arguments)
        while not ray.wait([coming], timeout=POLL)[0]:
            if self.stop.is_set():
                ray.cancel(coming, force=True)
                raise Stopped("the trial was stopped")
        return ray.get(coming)


def epoch_result(row: dict[str, Any]) -> dict[str, Any]:
    """An epoch of a training as a result."""
    return {"epoch": row["epoch"], "agreement": row["validation_answer_accuracy"]}


def reason_of(error: Exception) -> str:
    """The first line of what went wrong: Ray puts workers' tracebacks around it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".splitlines()[0]
