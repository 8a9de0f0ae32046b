"""The trials of a search as they lie in its folder: `trials/0007/trial.json`. They are all a search knows of its past."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from pyarrow.fs import FileSelector, FileType
from pydantic import BaseModel, ConfigDict

from pipeline.base import storage
from tune.search.space import Point

State = Literal["running", "finished", "stopped", "failed", "refused"]
FOLDER, FILE = "trials", "trial.json"


class Trial(BaseModel):
    """One student of a search.

    Attributes:
        number: from 0.
        point: what was chosen for it.
        state: `stopped` early by the scheduler, `refused` for its latency; `running` may be one that was interrupted.
        parameters: of the student, its embedding included.
        latency_ms: of one comment; None until it is measured.
        epochs: measures of each epoch: `epoch` and `agreement`.
        reason: why it failed, or was refused.
        run_id: in MLflow; None before its end.
        model: URI of the finished student as MLflow's model.
    """

    model_config = ConfigDict(extra="forbid")

    number: int
    point: Point
    state: State = "running"
    parameters: int
    latency_ms: float | None = None
    epochs: list[dict[str, float]] = []
    reason: str | None = None
    run_id: str | None = None
    model: str | None = None

    @property
    def name(self) -> str:
        """For people, and in MLflow."""
        return f"trial-{self.number:04d}"

    @property
    def agreement(self) -> float | None:
        """Share of validation comments answered as the teacher does, by the epoch that would be kept; None before the first."""
        if not self.epochs:
            return None
        return max(row["agreement"] for row in self.epochs)

    def note(self, result: dict[str, Any]) -> None:
        """Takes what `tune.search.trial` reports; an epoch counts once."""
        if "epoch" in result and (not self.epochs or self.epochs[-1]["epoch"] < result["epoch"]):
            self.epochs.append({name: result[name] for name in ("epoch", "agreement")})
        self.latency_ms = result.get("latency_ms", self.latency_ms)
        self.reason = result.get("reason", self.reason)
        self.model = result.get("model", self.model)

    def score(self, points_per_halving: float) -> float:
        """What one number must say for all objectives: percent of agreement, less some for each doubling of the student."""
        return 100 * (self.agreement or 0.0) - points_per_halving * math.log2(self.parameters)


def ended(trials: Iterable[Trial]) -> list[Trial]:
    """Those that are not to go on."""
    return [trial for trial in trials if trial.state != "running"]


def folder_of(search: str, number: int) -> str:
    """Where a trial's files are."""
    return storage.join(search, FOLDER, f"{number:04d}")


def save(search: str, trial: Trial) -> None:
    """Writes a trial's record, whole."""
    storage.write_json(storage.join(folder_of(search, trial.number), FILE), trial.model_dump(mode="json"))


def read_trial(search: str, number: int) -> Trial:
    """One trial's record."""
    return Trial.model_validate(storage.read_json(storage.join(folder_of(search, number), FILE)))


def read_trials(search: str) -> list[Trial]:
    """All trials of a search, by number; none where it has not begun."""
    fs, inner = storage.filesystem(storage.join(search, FOLDER))
    found = fs.get_file_info(FileSelector(inner, allow_not_found=True))
    places = [storage.join(search, FOLDER, info.base_name, FILE) for info in found if info.type == FileType.Directory]
    trials = [Trial.model_validate(storage.read_json(place)) for place in places if storage.exists(place)]
    return sorted(trials, key=lambda trial: trial.number)
