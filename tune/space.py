"""From a point of the search space to the configuration of one training."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.task import describe
from student.config import StudentConfig
from tune.config import Range, Space, key_types

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


def configure(base: RunConfig, shape: StudentConfig, point: Point) -> RunConfig:
    """The configuration of a trial.

    Args:
        base: what the space leaves alone.
        shape: of a student whose shape the space leaves alone.
        point: the trial's.

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
        return RunConfig.model_validate(content | {part: content[part] | chosen[part] for part in chosen})
    except ValidationError as error:
        raise UserError(f"no configuration:\n{describe(error)}") from error
