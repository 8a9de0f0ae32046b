"""Typed configuration of the student and its training. Each default is the thesis' unless a comment says otherwise."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """An unknown key is an error, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StudentConfig(Strict):
    """The student's shape. Its vocabularies and context come from the shards."""

    layers: int = Field(16, ge=1)
    width: int = Field(1024, ge=1)
    heads: int = Field(16, ge=1)
    mlp: int = Field(4096, ge=1, description="width of the feed-forward layer")

    @model_validator(mode="after")
    def _even_heads(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 × heads ({self.heads}), for rotary positions")
        return self


class StudentChanges(Strict):
    """What a run changes of the shape its task gives the student; null leaves a figure as it is."""

    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp: int | None = None

    def of(self, shape: StudentConfig) -> StudentConfig:
        """The changed shape.

        Raises:
            pydantic.ValidationError: it is no shape.
        """
        return StudentConfig.model_validate(shape.model_dump() | self.model_dump(exclude_none=True))


class TrainConfig(Strict):
    """The training of one student."""

    objective: Literal["curriculum", "hard-label"] = "curriculum"
    epochs: int = Field(15, ge=1)
    batch_size: int = Field(32, ge=1, description="examples of one step over all workers")
    learning_rate: float | None = Field(None, gt=0, description="peak of the cosine; null takes 0.25 / width")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient of one step")
    kl_start: float = Field(0.8, ge=0, le=1, description="weight of KL in the curriculum's first step; CE has the rest")
    kl_end: float = Field(0.2, ge=0, le=1, description="weight of KL in the curriculum's last step")
    seed: int = 0
    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(0.5, gt=0, description="CPUs Ray reserves for a worker")
    gpus_per_worker: float = Field(0, ge=0)
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker; null shares the machine's among the workers")
    samples: int = Field(4, ge=0, description="validation answers decoded after each epoch, for the report")

    def peak_rate(self, width: int) -> float:
        """The learning rate, by default falling with the student's width (Yang et al., "Tensor Programs V", 2022)."""
        return self.learning_rate or 0.25 / width
