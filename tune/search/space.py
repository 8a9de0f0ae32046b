"""The space of a search, and the configuration of one training at a point of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ConfigDict, Field, RootModel, ValidationError, model_validator

from pipeline.base.config import Strict, describe
from pipeline.base.errors import UserError
from pipeline.base.yaml_files import read_yaml
from pipeline.task.values import Scalar
from student.config import RUNTIME_ONLY_KEYS, StudentConfig, TrainConfig
from tune.config import TuneSettings

DEFAULT_SPACE = Path(__file__).resolve().parent.parent / "space.yaml"
RATIOS = {"student.mlp_ratio": float, "student.head_width": int}  # of `mlp` to the width, and of the width to `heads`
SAME = [("student.mlp", "student.mlp_ratio"), ("student.heads", "student.head_width")]


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
    fixed = RUNTIME_ONLY_KEYS | {"epochs"}  # what trials are stopped early in
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


Point = dict[str, Any]  # a value for each key of a space


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The space as Optuna has it, by key."""
    types = key_types()
    return {
        key: _range(values, whole=types[key] is int) if isinstance(values, Range) else CategoricalDistribution(values)
        for key, values in space.root.items()
    }


def _range(values: Range, whole: bool) -> BaseDistribution:
    if whole:
        return IntDistribution(round(values.low), round(values.high), log=values.log, step=round(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def configure(base: TuneSettings, shape: StudentConfig, point: Point) -> TuneSettings:
    """The configuration of a trial.

    Raises:
        UserError: the point is no configuration, such as a width that its heads do not divide.
    """
    chosen: dict[str, dict[str, Any]] = {"student": {}, "train": {}}
    for key, value in point.items():
        part, name = key.split(".")
        chosen[part][name] = value
    student, width = chosen["student"], chosen["student"].get("width") or shape.width
    if "mlp_ratio" in student:
        student["mlp"] = round(student.pop("mlp_ratio") * width)
    if "head_width" in student:
        student["heads"] = max(1, width // student.pop("head_width"))
    try:
        StudentConfig.model_validate(shape.model_dump() | student)
        content = base.model_dump()
        return type(base).model_validate(content | {part: content[part] | chosen[part] for part in chosen})
    except ValidationError as error:
        raise UserError(f"no configuration:\n{describe(error)}") from error
