"""The second floor of the configuration: a student's shape, and what its stages can be told."""

from __future__ import annotations

import os
from functools import reduce
from operator import truediv
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from pipeline.base.config import Seed, Strict, Threads, describe, presence
from pipeline.base.errors import UserError
from pipeline.config import PipelineSettings
from pipeline.task.task import Task


class StudentConfig(Strict):
    """The student's shape. Its vocabularies and context come from the shards.

    By default it trains in minutes on two CPU cores, and was the most faithful of a search's on 49,000 comments (docs/log.md).
    """

    layers: int = Field(2, ge=1, le=1000)
    width: int = Field(256, ge=1, le=1 << 16)
    heads: int = Field(8, ge=1)
    mlp: int = Field(1024, ge=1, le=1 << 20, description="width of the feed-forward layer")
    sequence: Literal["full", "choices"] = Field(
        "choices", description="read and write only the tokens that were choices, or whole answers"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of each layer's output left out in training")
    reader: str = Field(
        "own",
        description="what reads a text: its own blocks, `ngrams`, or a model of transformers by folder or Hub name",
    )
    reader_layers: int | None = Field(None, ge=1, description="of such a model, the first ones; null takes all")

    def sizes(self) -> dict[str, Any]:
        """All but the reader."""
        return self.model_dump(exclude={"reader", "reader_layers"})

    @model_validator(mode="after")
    def _even_heads(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 × heads ({self.heads}), for rotary positions")
        return self


THESIS = StudentConfig(layers=16, width=1024, heads=16, mlp=4096, sequence="full")  # 200 M parameters: for GPUs


class StudentChanges(Strict):
    """What a run changes of the shape its task gives the student; null leaves a figure as it is."""

    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp: int | None = None
    sequence: Literal["full", "choices"] | None = None
    dropout: float | None = None
    reader: str | None = None
    reader_layers: int | None = None

    def of(self, shape: StudentConfig) -> StudentConfig:
        """The changed shape.

        Raises:
            pydantic.ValidationError: it is no shape.
        """
        return StudentConfig.model_validate(shape.model_dump() | self.model_dump(exclude_none=True))


def task_shape(task: Task) -> StudentConfig:
    """The shape a task gives its student.

    Raises:
        UserError: the task's `student` has an unknown key, or describes no shape.
    """
    try:
        return StudentConfig.model_validate(task.student)
    except ValidationError as error:
        raise UserError(f"the task {task.name} does not describe a student:\n{describe(error)}") from error


def student_shape(task: Task, changes: StudentChanges) -> StudentConfig:
    """The shape a task gives its student, with a run's changes.

    Raises:
        UserError: the changes leave no shape.
    """
    return changed_shape(task_shape(task), changes)


def changed_shape(shape: StudentConfig, changes: StudentChanges) -> StudentConfig:
    """A student's shape, with a run's changes.

    Raises:
        UserError: the changes leave no shape.
    """
    try:
        return changes.of(shape)
    except ValidationError as error:
        raise UserError(f"the student has no such shape:\n{describe(error)}") from error


RUNTIME_ONLY_KEYS = {
    "init",  # a training's identity has the content instead
    "accumulation",
    "gradient_checkpointing",
    "strategy",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "machines",
    "threads",
    "checkpoint_minutes",
    "max_failures",
    "log_every",
}


class TrainConfig(Strict):
    """The training of one student."""

    objective: Literal["curriculum", "hard-label", "temperature", "topk", "slim", "reverse-kl"] = "curriculum"
    kl_start: float | None = Field(None, ge=0, description="weight of KL in the first step; null takes the objective's")
    kl_end: float | None = Field(None, ge=0, description="weight of KL in the last step; null takes the objective's")
    ce_start: float | None = Field(None, ge=0, description="weight of CE in the first step; null takes the objective's")
    ce_end: float | None = Field(None, ge=0, description="weight of CE in the last step; null takes the objective's")
    weights: Literal["constant", "linear", "cosine", "step"] = Field(
        "linear", description="how the weights go from start to end; constant stays at the start, step changes half way"
    )
    temperature: float | None = Field(
        None, gt=0, description="of KL's softmaxes, its loss times T²; null takes the objective's"
    )
    tail: bool = Field(False, description="give the teacher's mass outside the watched tokens a class of its own in KL")
    forced_weight: float = Field(1.0, ge=0, description="weight of a forced step in every mean; a choice step weighs 1")
    balance: float = Field(0.0, ge=0, le=1, description="power of a token's inverse frequency that weights it in CE")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of CE's target spread evenly over its classes")

    init: str | None = Field(None, description="folder of a student, such as `retort prune` writes, to start from its weights")
    hidden: float = Field(
        0, ge=0, description="weight of the distance between hidden states of a pruned student and those of its source"
    )
    epochs: int = Field(15, ge=1)
    growth: tuple[float, ...] = Field((1.0,), description="share of the examples each epoch draws from, the last for the rest")
    batch_size: int | None = Field(
        None, ge=1, description="examples of one step over all workers; null takes 16 with a pretrained reader, and 32 else"
    )
    accumulation: int = Field(1, ge=1, description="parts a worker runs its share of a step in, to save memory")
    gradient_checkpointing: bool = Field(
        False, description="compute a pretrained reader's layers again in the backward pass, to save memory"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="peak of the cosine; null takes 0.25 / width, or with init 0.1 / width"
    )
    reader_learning_rate: float = Field(
        2e-4, ge=0, description="peak for the weights of a pretrained reader; 0 leaves them as they are"
    )
    weight_decay: float = Field(0.01, ge=0)
    precision: Literal["float32", "bf16"] | None = Field(
        None,
        description="of the matrix products; null takes bf16 for a pretrained reader where the machine has it, else float32",
    )
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
        return self.model_dump(mode="json", exclude=RUNTIME_ONLY_KEYS)

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

    def with_batch(self, pretrained: bool) -> TrainConfig:
        """Itself with the size of its batches.

        A pretrained reader learns more from many small steps (docs/log.md).
        """
        return self.model_copy(update={"batch_size": self.batch_size or (16 if pretrained else 32)})

    @property
    def step_examples(self) -> int:
        """Examples of one step, once they are known."""
        if self.batch_size is None:
            raise AssertionError("with_batch says how many")
        return self.batch_size

    def peak_rate(self, width: int) -> float:
        """The learning rate, by default falling with the student's width (Yang et al., "Tensor Programs V", 2022).

        One that starts from trained weights takes smaller steps; see docs/pruning.md.
        """
        return self.learning_rate or (0.1 if self.init else 0.25) / width


def _shares(value: Any) -> Any:
    """urgent=0.99,team=0.9 as people write it."""
    return dict(part.rpartition("=")[::2] for part in value.split(",")) if isinstance(value, str) else value


Agreement = Annotated[float, Field(gt=0, lt=1)]


class AnswerConfig(Strict):
    """How a student answers, and whom to ask where it is unsure."""

    weights: Literal["float32", "bf16"] = Field(
        "float32", description="bf16 takes half the memory, and on CPUs with bf16 it is faster for students of some millions"
    )

    teacher: str | None = Field(
        None,
        description="name or path of a teacher beside the student, or an API's model, on the engine that `teacher` configures",
    )
    fallback: float | None = Field(
        None, ge=0, le=1, description="confidence below which the teacher's answer is taken; null takes the student's always"
    )
    agree: Agreement | None = Field(
        None, description="instead of a fallback: share of the student's own answers that are to be the teacher's, certified"
    )
    agree_fields: Annotated[dict[str, Agreement], BeforeValidator(_shares)] = Field(
        {}, description="the same of single fields, as urgent=0.99,team=0.9"
    )
    unfamiliar: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of texts like those trained on that is the teacher's too, so that most strange texts are",
    )

    @property
    def certified(self) -> bool:
        """Whether a certificate says what the student answers alone."""
        return self.agree is not None or bool(self.agree_fields)

    @property
    def asks(self) -> bool:
        """Whether anything says when the teacher is asked."""
        return self.certified or self.fallback is not None or self.unfamiliar is not None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.fallback is not None and self.teacher is None:
            raise ValueError("a fallback needs somebody to fall back on: name the teacher (--teacher)")
        if self.unfamiliar is not None and self.teacher is None and not self.certified:
            raise ValueError(
                "somebody has to answer unfamiliar texts: name the teacher (--teacher), or say what is to agree (--agree)"
            )
        if self.certified and self.fallback is not None:
            raise ValueError("give either a fallback, or a share that is to agree: that chooses the fallback")
        if self.certified and self.weights != "float32":
            raise ValueError("what is certified is so with weights in float32, with which it was measured")
        return self


class FloorsConfig(Strict):
    """What a student's report holds it against: a linear SVM, the majority answer, and an encoder's frozen embeddings."""

    examples: int = Field(
        50_000, ge=0, description="training examples the floors learn from, which bounds their time; 0 fits none"
    )
    embedder: str | None = Field(
        None, description="folder of a sentence encoder that transformers reads: adds the floor of its frozen embeddings"
    )


class PredictConfig(Strict):
    """The answers of a student to texts."""

    format: Literal["jsonl", "parquet"] = Field("jsonl", description="of the files of answers")
    probabilities: bool = Field(False, description="write the share of every value of every field too")
    workers: int | None = Field(
        None,
        ge=0,
        description="under Ray Data; 0 answers in this process, null does so where the texts are less than 64 MiB",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs Ray reserves for a worker, which are its threads")
    gpus_per_worker: float = Field(0, ge=0)
    machines: str | None = Field(None, description="custom Ray resource of the machines to run on; null takes any")

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker} | presence(self.machines)


class ServeConfig(Strict):
    """How a student is served."""

    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0 is every one of this machine")
    hosts: tuple[Annotated[str, Field(pattern=r"^[\w.-]+$")], ...] = Field(
        (), description="names under which clients ask for it, beside localhost, the machine's own and `host`; without ports"
    )
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    max_texts: int = Field(1024, ge=1, le=4096, description="texts of one request; the queue holds 4,096")
    max_bytes: int = Field(4 << 20, ge=1, description="of a request's body")
    timeout_seconds: float = Field(30, gt=0, description="after which a request is given up")
    drain_seconds: float = Field(30, gt=0, description="that the requests in flight have when the service is asked to stop")
    workers: int = Field(1, ge=1, description="processes that decode; the port, the teacher and audits stay in one")
    threads: Threads | None = Field(None, description="CPU threads of each; null shares the machine's among them")
    key: str | None = Field(
        None, description="environment variable that holds the key which callers must send, as `Authorization: Bearer …`"
    )
    certificate: str | None = Field(None, description="PEM file of a certificate chain: speak HTTPS")
    private_key: str | None = Field(None, description="PEM file of its key, where the certificate's file does not hold it")
    audit: float = Field(
        0,
        ge=0,
        le=1,
        description="share of the student's own answers that the teacher is asked about too: does it still agree?",
    )

    @model_validator(mode="after")
    def _has_certificate(self) -> Self:
        if self.private_key and not self.certificate:
            raise ValueError("private_key needs its certificate")
        return self


SIZES = ("width", "heads", "mlp", "layers")


def _parts(value: Any) -> Any:
    """1/4 as people write it."""
    try:
        return reduce(truediv, map(float, value.split("/", 1))) if isinstance(value, str) else value
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{value} is no share: write 1/4 or 0.25") from error


def _links(value: Any) -> Any:
    return [_parts(part) for part in value.split(",")] if isinstance(value, str) else value


Share = Annotated[float, BeforeValidator(_parts), Field(gt=0, le=1)]


class PruneConfig(Strict):
    """How a smaller student is cut from a trained model."""

    source: str | None = Field(None, description="a student's folder, or a Gemma 3 model by Hugging Face name or path")
    revision: str | None = Field(None, description="commit, branch or tag of such a model on the Hub")
    prompt: Literal["teacher", "bare"] = Field(
        "teacher", description="what a student cut from such a model reads: the teacher's prompt, or text and separator"
    )

    width: int | None = Field(None, ge=1, description="embedding channels to keep; null keeps all, as below")
    heads: int | None = Field(None, ge=1, description="attention heads a layer")
    mlp: int | None = Field(None, ge=1, description="feed-forward neurons a layer")
    layers: int | None = Field(None, ge=1)
    params: int | None = Field(None, ge=1, description="instead of sizes: parameters to keep at most, embedding included")
    fraction: Share | None = Field(None, description="the same as a share of the source's, such as 1/4")
    by: Literal["width", "depth"] = Field(
        "width", description="what goes for params and fraction: width, heads and neurons alike, or layers"
    )
    chain: Annotated[tuple[Share, ...], BeforeValidator(_links)] = Field(
        (), description="falling shares of the source's parameters: each link is cut from the one before, and trained"
    )

    examples: int = Field(1024, ge=1, description="training examples that importance is measured on")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [any(getattr(self, name) for name in SIZES), self.params, self.fraction, self.chain]
        if sum(map(bool, given)) > 1:
            raise ValueError("give either sizes (width, heads, mlp, layers), or params, or fraction, or chain")
        if any(later >= earlier for earlier, later in zip((1.0, *self.chain), self.chain, strict=False)):
            raise ValueError("the shares of a chain must fall, from below 1")
        return self

    @property
    def has_target(self) -> bool:
        """Whether it says how small the student is to be."""
        return any(getattr(self, name) for name in (*SIZES, "params", "fraction"))

    def recipe(self) -> dict[str, Any]:
        """For JSON: all that changes what is kept."""
        return self.model_dump(mode="json", exclude={"source", "chain"})


class StudentSettings(PipelineSettings):
    """All that the stages from a student's training to its service can be told."""

    student: StudentChanges = StudentChanges()
    prune: PruneConfig = PruneConfig()
    train: TrainConfig = TrainConfig()
    floors: FloorsConfig = FloorsConfig()
    answer: AnswerConfig = AnswerConfig()
    predict: PredictConfig = PredictConfig()
    serve: ServeConfig = ServeConfig()
