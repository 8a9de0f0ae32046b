"""Typed configuration of the student and its training."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """An unknown key is an error, numbers are finite and integers have 64 bits at most, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _in_64_bits(cls, value: Any) -> Any:
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, int) and abs(item) > sys.maxsize:
                raise ValueError("an integer must fit in 64 bits")
        return value


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy, PyTorch and Optuna all take
Threads = Annotated[int, Field(ge=1, le=1024)]  # PyTorch crashes when it is to start 100,000


class StudentConfig(Strict):
    """The student's shape. Its vocabularies and context come from the shards.

    By default it trains in minutes on two CPU cores, and was the most faithful of a search's on 49,000 comments (docs/log.md).
    """

    layers: int = Field(2, ge=1, le=1000)
    width: int = Field(256, ge=1, le=1 << 16)
    heads: int = Field(8, ge=1)
    mlp: int = Field(1024, ge=1, le=1 << 20, description="width of the feed-forward layer")
    sequence: Literal["full", "choices"] = Field("full", description="read whole answers, or only the tokens that were choices")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of each layer's output left out in training")

    @model_validator(mode="after")
    def _even_heads(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 × heads ({self.heads}), for rotary positions")
        return self


THESIS = StudentConfig(layers=16, width=1024, heads=16, mlp=4096)  # 200 M parameters: for GPUs


class StudentChanges(Strict):
    """What a run changes of the shape its task gives the student; null leaves a figure as it is."""

    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp: int | None = None
    sequence: Literal["full", "choices"] | None = None
    dropout: float | None = None

    def of(self, shape: StudentConfig) -> StudentConfig:
        """The changed shape.

        Raises:
            pydantic.ValidationError: it is no shape.
        """
        return StudentConfig.model_validate(shape.model_dump() | self.model_dump(exclude_none=True))


PRESENCE = 0.001  # of a machine's custom resource: a worker takes so little because any number may run there


def presence(machines: str | None) -> dict[str, float]:
    """What puts a worker on machines that offer a custom Ray resource, such as `teacher` in cluster/aws.yaml."""
    return {machines: PRESENCE} if machines else {}


class AnswerConfig(Strict):
    """How a student answers, and whom to ask where it is unsure."""

    weights: Literal["float32", "bf16"] = Field(
        "float32", description="bf16 takes half the memory, and on CPUs with bf16 it is faster for students of some millions"
    )

    teacher: str | None = Field(
        None, description="Hugging Face name or path of a teacher beside the student, on the engine that `teacher` configures"
    )
    fallback: float | None = Field(
        None, ge=0, le=1, description="confidence below which the teacher's answer is taken; null takes the student's always"
    )

    @model_validator(mode="after")
    def _has_teacher(self) -> Self:
        if self.fallback is not None and self.teacher is None:
            raise ValueError("a fallback needs somebody to fall back on: name the teacher (--teacher)")
        return self


class PredictConfig(AnswerConfig):
    """The answers of a student to comments."""

    format: Literal["jsonl", "parquet"] = Field("jsonl", description="of the files of answers")
    probabilities: bool = Field(False, description="write the share of every value of every field too")
    rows_per_unit: int = Field(8192, ge=1, le=100_000, description="comments of one unit of work and of one file")
    workers: int | None = Field(
        None,
        ge=0,
        description="under Ray Data; 0 answers in this process, null does so where the comments are less than 64 MiB",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs Ray reserves for a worker, which are its threads")
    gpus_per_worker: float = Field(0, ge=0)
    machines: str | None = Field(None, description="custom Ray resource of the machines to run on; null takes any")

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.teacher is not None and self.fallback is None:
            raise ValueError("say below which confidence the teacher is asked (--fallback)")
        return self

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker} | presence(self.machines)


HOW = {
    "init",  # a training's identity has the content instead
    "accumulation",
    "strategy",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "machines",
    "threads",
    "checkpoint_minutes",
    "max_failures",
    "log_every",
    "samples",
}


class TrainConfig(Strict):
    """The training of one student."""

    objective: Literal["curriculum", "hard-label", "temperature", "topk", "slim", "reverse-kl"] = "curriculum"
    kl_start: float | None = Field(None, ge=0, description="weight of KL in the first step; null takes the objective's")
    kl_end: float | None = Field(None, ge=0, description="weight of KL in the last step; null takes the objective's")
    ce_start: float | None = Field(None, ge=0, description="weight of CE in the first step; null takes the objective's")
    ce_end: float | None = Field(None, ge=0, description="weight of CE in the last step; null takes the objective's")
    weights: Literal["constant", "linear", "cosine", "step"] = Field(
        "linear", description="how the weights go from start to end; constant stays at the start, step changes at `switch`"
    )
    switch: float = Field(0.5, ge=0, le=1, description="share of the steps after which the weights step")
    temperature: float | None = Field(
        None, gt=0, description="of KL's softmaxes, its loss times T²; null takes the objective's"
    )
    tail: bool = Field(False, description="give the teacher's mass outside the watched tokens a class of its own in KL")
    top_k: int = Field(100, ge=1, description="topk: the teacher's largest logits that count")
    top_share: float = Field(0.05, gt=0, le=1, description="slim: share of the teacher's largest logits that count")
    forced_weight: float = Field(1.0, ge=0, description="weight of a forced step in every mean; a choice step weighs 1")
    balance: float = Field(0.0, ge=0, le=1, description="power of a token's inverse frequency that weights it in CE")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of CE's target spread evenly over its classes")

    init: str | None = Field(None, description="folder of a student, such as `retort prune` writes, to start from its weights")
    hidden: float = Field(
        0, ge=0, description="weight of the distance between hidden states of a pruned student and those of its source"
    )
    epochs: int = Field(15, ge=1)
    growth: tuple[float, ...] = Field((1.0,), description="share of the examples each epoch draws from, the last for the rest")
    batch_size: int = Field(32, ge=1, description="examples of one step over all workers")
    accumulation: int = Field(1, ge=1, description="parts a worker runs its share of a step in, to save memory")
    learning_rate: float | None = Field(
        None, gt=0, description="peak of the cosine; null takes 0.25 / width, or with init 0.1 / width"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient of one step")
    precision: Literal["float32", "bf16"] = Field("float32", description="of the matrix products; weights stay float32")
    seed: Seed = 0

    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = Field(
        "ddp", description="what workers hold in shares: nothing, optimizer states, gradients too, weights too"
    )
    workers: int | tuple[int, int] = Field(1, description="how many, or the fewest and the most, as the cluster has room")
    cpus_per_worker: float = Field(0.5, gt=0, description="CPUs Ray reserves for a worker")
    gpus_per_worker: float = Field(0, ge=0)
    machines: str | None = Field(None, description="custom Ray resource of the machines to run on; null takes any")
    threads: Threads | None = Field(None, description="CPU threads of a worker; null shares the machine's among the workers")
    checkpoint_minutes: float = Field(15, gt=0, description="minutes between two checkpoints within an epoch")
    max_failures: int = Field(3, ge=0, description="how often training goes on from its last checkpoint after a worker died")
    log_every: int = Field(10, ge=1, description="steps between two rows of metrics, and two looks for a wish to stop")
    samples: int = Field(4, ge=0, description="validation answers decoded after each epoch, for the report")

    @field_validator("growth")
    @classmethod
    def _shares(cls, growth: tuple[float, ...]) -> tuple[float, ...]:
        if not growth or not all(0 < share <= 1 for share in growth):
            raise ValueError("growth takes shares of the examples, above 0 and at most 1")
        return growth

    @field_validator("workers")
    @classmethod
    def _range(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        fewest, most = (workers, workers) if isinstance(workers, int) else workers
        if not 1 <= fewest <= most:
            raise ValueError("workers takes a count from 1, or the fewest and the most of them")
        return workers

    @model_validator(mode="after")
    def _whole_cpus(self) -> Self:
        if not isinstance(self.workers, int) and not float(self.cpus_per_worker).is_integer():
            raise ValueError("a range of workers needs a whole number of cpus_per_worker: Ray counts in those for it")
        return self

    def recipe(self) -> dict[str, Any]:
        """For JSON: all that changes what is trained. The rest changes how fast, on what, and what is reported."""
        return self.model_dump(mode="json", exclude=HOW)

    @property
    def most_workers(self) -> int:
        """How many workers there may be."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def fewest_workers(self) -> int:
        """How many workers there must be."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker} | presence(self.machines)

    @property
    def threads_per_worker(self) -> int:
        """CPU threads of a worker, by default its share of this machine's."""
        return self.threads or max(1, (os.cpu_count() or 1) // self.most_workers)

    def peak_rate(self, width: int) -> float:
        """The learning rate, by default falling with the student's width (Yang et al., "Tensor Programs V", 2022).

        One that starts from trained weights takes smaller steps; see docs/pruning.md.
        """
        return self.learning_rate or (0.1 if self.init else 0.25) / width
