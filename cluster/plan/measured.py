"""What `retort scale` measured, as a plan takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cluster.config import ClusterSettings
from cluster.plan.arithmetic import WEIGHT_BYTES
from pipeline.base import storage
from pipeline.base.config import describe
from pipeline.base.errors import UserError
from pipeline.config import ExtractConfig
from student.config import StudentConfig, TrainConfig
from tune.scaling.rows import ExtractRow, TrainRow

SPEED = {"extract": ("capture", "codec"), "train": ("precision", "accumulation")}  # settings that measured times depend on


@dataclass(frozen=True)
class Measured:
    """The content of a scale.json.

    Attributes:
        extract: rows of extraction; none where it was not measured.
        train: rows of training, likewise.
        settings: what was measured, by stage.
    """

    extract: list[ExtractRow]
    train: list[TrainRow]
    settings: dict[str, Any]

    @property
    def student(self) -> StudentConfig | None:
        """The student that was trained."""
        return StudentConfig.model_validate(self.settings["train"]["student"]) if self.train else None

    @property
    def params(self) -> int | None:
        """Its parameters: its gradients are float32."""
        return self.train[0].bytes // WEIGHT_BYTES if self.train else None

    @property
    def command(self) -> float:
        """Seconds of a command before it has Ray: its imports, and a local Ray's start."""
        return max(row.command for row in [*self.extract, *self.train])

    @property
    def gpus(self) -> bool:
        """Whether workers had GPUs."""
        stages = self.settings.get("extract", {}).get("teacher", {}), self.settings.get("train", {}).get("train", {})
        return any(stage.get(name, 0) > 0 for stage, name in zip(stages, ("gpus", "gpus_per_worker"), strict=True))


def read_measured(path: str) -> Measured:
    """Reads a scale.json.

    Raises:
        UserError: it is missing, or `retort scale` did not write it.
    """
    content = storage.read_json(path)
    try:
        rows = content["measured"]
        extract = TypeAdapter(list[ExtractRow]).validate_python(rows.get("extract", []))
        train = TypeAdapter(list[TrainRow]).validate_python(rows.get("train", []))
        return Measured(extract, train, content["settings"])
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no scale.json of retort scale: give the file that it leaves in OUT/scale") from error


def as_measured(config: ClusterSettings, measured: Measured) -> ClusterSettings:
    """The configuration, with what it leaves at its defaults as it was measured.

    Raises:
        UserError: the two have no meaning together.
    """
    changes: dict[str, Any] = {}
    try:
        if measured.extract:
            found = measured.settings["extract"]["extract"] | config.extract.model_dump(exclude_unset=True)
            changes["extract"] = ExtractConfig.model_validate(found)
        if measured.train:
            found = measured.settings["train"]["train"] | config.train.model_dump(exclude_unset=True)
            changes["train"] = TrainConfig.model_validate(found)
    except ValidationError as error:
        raise UserError(f"the settings that were measured do not go with the run's:\n{describe(error)}") from error
    return config.model_copy(update=changes)


def differences(config: ClusterSettings, measured: Measured) -> list[str]:
    """Sentences about settings that the run has otherwise than what was measured, and that change how long it takes."""
    found = []
    for stage, keys in SPEED.items():
        before, now = measured.settings.get(stage, {}).get(stage, {}), getattr(config, stage).model_dump()
        found += [(f"{stage}.{key}", before[key], now[key]) for key in keys if before.get(key, now[key]) != now[key]]
    return [f"measured with {key}={old}, planned with {new}: times will differ" for key, old, new in found]
