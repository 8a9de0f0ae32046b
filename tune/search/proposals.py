"""Where Ray Tune gets its trials from: those that were interrupted, then new ones that Optuna proposes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipeline.base.errors import UserError
from tune.config import TuneConfig
from tune.search.space import Point
from tune.search.trials import Trial, save

log = logging.getLogger(__name__)

PATIENCE = 1000  # points drawn for one that is possible
DIRECTIONS: list[Literal["maximize", "minimize"]] = ["maximize", "minimize", "minimize"]  # of `objectives`


def objectives(trial: Trial) -> tuple[float, float, float] | None:
    """What a search is after: agreement, parameters, milliseconds; None while a trial does not have them."""
    if trial.agreement is None or trial.latency_ms is None:
        return None
    return trial.agreement, float(trial.parameters), trial.latency_ms


class Proposals(Searcher):
    """Proposes trials and learns from them.

    Args:
        size: the parameters of a point's student. It raises UserError for a point that is no student, or too large a one.
        folder: of the search; a trial is written there before it starts.
        known: the search's trials so far. Those that were interrupted go first.
    """

    def __init__(
        self,
        config: TuneConfig,
        space: dict[str, BaseDistribution],
        size: Callable[[Point], int],
        folder: str,
        known: list[Trial],
        others: list[Trial],
        ended: Callable[[Trial], None],
    ) -> None:
        super().__init__(metric="agreement", mode="max")
        self._space, self._size, self._folder, self._ended = space, size, folder, ended
        self.trials = {trial.number: trial for trial in known}
        self._interrupted = [trial for trial in known if trial.state == "running"]
        self._asked: dict[str, tuple[Trial, optuna.trial.Trial]] = {}  # by Ray Tune's id
        seed = config.seed + len(known) + len(others)  # what was drawn before must not be drawn again
        sampler = optuna.samplers.TPESampler(seed=seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(directions=DIRECTIONS, sampler=sampler)
        for trial in known:
            self._learn(trial)
        if others:
            log.info("learnt from %s of %s trials of earlier searches", sum(map(self._learn, others)), len(others))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next trial, as Ray Tune's configuration."""
        asked = self._go_on() if self._interrupted else self._new()
        self._asked[trial_id] = asked
        trial = asked[0]
        self.trials[trial.number] = trial
        save(self._folder, trial)
        return {"number": trial.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Notes what a trial has reached."""
        trial = self._asked[trial_id][0]
        trial.note(result)
        if "epoch" in result:
            save(self._folder, trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learns from a trial that has ended. One without a result is to go on another time."""
        trial, asked = self._asked.pop(trial_id)
        if error:
            trial.state, trial.reason = "failed", "its process died; --verbose shows its log"
        elif result:
            trial.note(result)
            trial.state = result.get("state", "stopped")
        values = objectives(trial)
        if values is None or trial.state in ("failed", "refused"):
            self._study.tell(asked, state=TrialState.FAIL)
        else:
            self._study.tell(asked, values)
        if trial.state != "running":
            self._ended(trial)

    def save(self, checkpoint_path: str) -> None:
        """An empty file: the trials' own files are what a search goes on from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""

    def _go_on(self) -> tuple[Trial, optuna.trial.Trial]:
        trial = self._interrupted.pop(0)
        self._study.enqueue_trial(trial.point)
        return trial, self._study.ask(self._space)

    def _new(self) -> tuple[Trial, optuna.trial.Trial]:
        """A point that is a student within the limits.

        Raises:
            UserError: the space seems to have none.
        """
        for _ in range(PATIENCE):
            asked = self._study.ask(self._space)
            try:
                size = self._size(asked.params)
            except UserError as error:
                self._study.tell(asked, state=TrialState.FAIL)
                refused = error
                continue
            return Trial(number=len(self.trials), point=asked.params, parameters=size), asked
        raise UserError(f"{PATIENCE:,} students of the space were drawn and none is possible; the last one: {refused}")

    def _learn(self, trial: Trial) -> bool:
        """From a trial of the past, where it was measured and lies in the space; says whether it did."""
        values = objectives(trial)
        if values is None or trial.state not in ("finished", "stopped"):
            return False
        try:
            past = optuna.trial.create_trial(values=values, params=trial.point, distributions=self._space)
        except ValueError:  # of another space
            return False
        self._study.add_trial(past)
        return True
