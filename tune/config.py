"""Typed configuration of a search, and the space it searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, RootModel, ValidationError, field_validator, model_validator

from pipeline.errors import UserError
from pipeline.task import describe
from pipeline.yaml_files import read_yaml
from student.config import HOW, Seed, Strict, StudentConfig, TrainConfig

DEFAULT_SPACE = Path(__file__).parent / "space.yaml"
RATIOS = {"student.mlp_ratio": float, "student.head_width": int}  # of `mlp` to the width, and of the width to `heads`
SAME = [("student.mlp", "student.mlp_ratio"), ("student.heads", "student.head_width")]

Scalar = bool | int | float | str | None


class Range(Strict):
    """Numbers from `low` to `high`, both among them."""

    low: float
    high: float
    log: bool = Field(False, description="draw the logarithm evenly")
    step: float | None = Field(None, gt=0, description="distance between two values")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high or (self.log and self.low <= 0):
            raise ValueError(f"a range goes up from low to high, and from above 0 with log, not {self.low:g} to {self.high:g}")
        if self.log and self.step:
            raise ValueError("a range takes log or step, not both")
        return self


class Space(RootModel[dict[str, list[Scalar] | Range]]):
    """What a search may choose: for each key of the configuration a list of values, or a range.

    Keys are those of `student` and `train` that change what is trained, and two ratios that go with the width:
    `student.mlp_ratio` and `student.head_width`.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="after")
    def _known(self) -> Self:
        unknown = sorted(set(self.root) - set(key_types()))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such key; a space may have {', '.join(sorted(key_types()))}")
        if empty := [key for key, values in self.root.items() if values == []]:
            raise ValueError(f"{', '.join(empty)}: no values")
        if both := [pair for pair in SAME if set(pair) <= set(self.root)]:
            raise ValueError(f"{' and '.join(both[0])} say the same: choose one")
        return self


def key_types() -> dict[str, Any]:
    """The type of each key a space may have."""
    student = {f"student.{name}": field.annotation for name, field in StudentConfig.model_fields.items()}
    fixed = HOW | {"epochs"}  # what trials are stopped early in
    train = {f"train.{name}": field.annotation for name, field in TrainConfig.model_fields.items() if name not in fixed}
    return student | train | RATIOS


def read_space(path: str | None) -> Space:
    """A space from its YAML file; the default one without.

    Raises:
        UserError: it cannot be read, or says what no space can.
    """
    try:
        return Space.model_validate(read_yaml(path or str(DEFAULT_SPACE)))
    except ValidationError as error:
        raise UserError(f"{path}: the search space is wrong:\n{describe(error)}") from error


class TuneConfig(Strict):
    """A search."""

    space: str | None = Field(None, description="YAML file of the search space; null takes tune/space.yaml")
    trials: int = Field(16, ge=1, description="how many students to try")
    concurrent: int | None = Field(None, ge=1, description="trials at once; null takes as many as the cluster has room for")
    algorithm: Literal["tpe", "random"] = Field("tpe", description="Optuna's multi-objective TPE, or chance")
    seed: Seed = 0
    early_stopping: bool = Field(True, description="stop trials that fall behind (ASHA)")
    grace_epochs: int = Field(1, ge=1, description="epochs before a trial may be stopped")
    reduction: int = Field(3, ge=2, description="one trial in so many goes on, each time")
    points_per_halving: float = Field(
        0.5, ge=0, description="points of agreement that a student of half the parameters may lose and still count as good"
    )
    max_params: int | None = Field(None, ge=1, description="parameters a student may have, its embedding included")
    max_latency_ms: float | None = Field(None, gt=0, description="milliseconds it may take for one comment where it trains")
    warm_start: list[str] = Field([], description="folders of earlier searches to learn from")


class ScaleConfig(Strict):
    """How scaling is measured, and what its model assumes where nothing was measured."""

    workers: list[int] = Field([], description="counts to measure beside 1; empty takes 2, 4, … as far as the cluster has room")
    stage: Literal["extract", "train", "both"] = "both"
    units_per_worker: int = Field(6, ge=5, description="units each teacher actor extracts; its first one starts it up")
    steps: int = Field(12, ge=1, description="training steps timed of each kind")
    rows: int = Field(500_000, ge=1, description="comments of the extraction that the model extrapolates")
    link_gbit: float = Field(
        100, gt=0, description="Gbit/s of a machine's network, where no measurement spans two: a GPU machine's, cautiously"
    )
    link_latency_us: float = Field(
        10, gt=0, description="microseconds of a hop between machines, likewise: NCCL's tuning table has 9.6 for a ring's"
    )
    price_per_hour: float | None = Field(None, gt=0, description="of one worker's share of a machine, in any currency")

    @field_validator("workers")
    @classmethod
    def _counts(cls, workers: list[int]) -> list[int]:
        if any(count < 1 for count in workers):
            raise ValueError("workers takes counts from 1")
        return workers
