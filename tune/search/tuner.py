"""A search under Ray Tune: how many trials at once, which to stop early, and the run itself."""

from __future__ import annotations

import os
import tempfile
import threading
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.stopper import NoopStopper, Stopper

from pipeline.base.signals import Stopped, StopRequest
from student.config import TrainConfig
from tune.config import TuneConfig, TuneSettings
from tune.search.proposals import Proposals
from tune.search.trial import Search, TrialActor
from tune.search.trials import Trial, ended

LITTLE = 0.001  # of this machine: a trial's own actor takes no CPU, as its workers may need them all


GRACE_EPOCHS = 1  # before a trial may be stopped
REDUCTION = 3  # one trial in so many goes on, each time


def concurrent_trials(config: TuneConfig, train: TrainConfig) -> int:
    """How many trials run at once: as many as the cluster has room for, a CPU at least for each worker."""
    room = ray.cluster_resources()
    each = train.resources | {"CPU": max(train.cpus_per_worker, 1.0)}
    fit = [int(room.get(name, 0.0) / (train.most_workers * amount)) for name, amount in each.items() if amount]
    return config.concurrent or max(1, min([*fit, config.trials]))


def asha(config: TuneSettings, known: list[Trial]) -> TrialScheduler:
    """ASHA (Li et al., "A System for Massively Parallel Hyperparameter Tuning", 2020) by score, or no early stopping."""
    if not config.tune.early_stopping:
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric="score",
        mode="max",
        max_t=config.train.epochs + 1,  # a trial's end is its own to tell
        grace_period=GRACE_EPOCHS,
        reduction_factor=REDUCTION,
    )
    for trial in ended(known):
        for count in range(1, len(trial.epochs) + 1):
            upto = trial.model_copy(update={"epochs": trial.epochs[:count]})
            seen = SimpleNamespace(trial_id=trial.name)
            scheduler._brackets[0].on_result(seen, trial.epochs[count - 1]["epoch"], upto.score(config.tune.points_per_halving))
    return scheduler


class _Stopper(Stopper):
    """Ends all trials when a signal has asked for it."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._stop)

    def __reduce__(self) -> tuple[Any, ...]:
        return NoopStopper, ()  # in Ray Tune's own files, which nobody reads


def run_tuner(job: Search, proposals: Proposals, scheduler: TrialScheduler) -> None:
    """Runs Ray Tune in a thread of its own, as signals come to the main one.

    Raises:
        Stopped: a signal ended it early.
    """
    errors: list[BaseException] = []
    with StopRequest("saving the trials under way") as stop, tempfile.TemporaryDirectory(prefix="retort-tune-") as scratch:
        tuner = _tuner(job, proposals, scheduler, _Stopper(stop), scratch)

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=fit, daemon=True, name="Ray Tune")
        thread.start()
        while thread.is_alive():
            thread.join(0.3)
    if errors:
        raise errors[0]
    done, trials = len(ended(proposals.trials.values())), job.base.tune.trials
    if done < trials:
        raise Stopped(f"the search stopped after {done} of {trials} trials, saved in {job.folder}")


def _tuner(job: Search, proposals: Proposals, scheduler: TrialScheduler, stopper: Stopper, scratch: str) -> tune.Tuner:
    config = job.base
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial has nothing to say before its first epoch
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints what `verbose=0` should hide
    here = f"node:{ray.util.get_node_ip_address()}"  # where MLflow's database may lie
    trainable = tune.with_parameters(TrialActor, search=job)
    return tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([{here: LITTLE}])),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=scheduler,
            num_samples=config.tune.trials - len(ended(proposals.trials.values())),
            max_concurrent_trials=concurrent_trials(config.tune, config.train),
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=scratch,  # for files of its own, of no use afterwards
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            stop=stopper,
            verbose=0,
        ),
    )
