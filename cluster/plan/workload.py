"""How much work a run is: counts, lengths in tokens, and the sizes of its models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.config import ClusterSettings
from cluster.plan.measured import Measured
from pipeline.base.errors import UserError
from pipeline.task.task import Task
from pipeline.task.task_file import load_task
from student.config import THESIS, StudentConfig, TrainConfig, changed_shape, task_shape
from student.data.unpack import SPLIT_TENTHS, TEST, TRAIN, VALIDATION
from student.model.model import Student
from student.model.pretrained import pretrained_folder, reader_shape
from student.model.shape import ReaderShape, Shape

EMBEDDING_ROWS = 262_144  # of the student's embedding: at most Gemma 3's vocabulary; comments use fewer ids
CHARACTERS_PER_TOKEN = 4  # of English, a rule of thumb
CHARACTERS_PER_ANSWER_TOKEN = 2  # of JSON, where quotes and braces are tokens: 1.9 with the small teacher's tokenizer
TEMPLATE_TOKENS = 10  # a chat template's own
CALLS = {"choices": 0.8, "all": 1.8}  # of the teacher beyond one a field: 3.8 and 4.8 measured with three (docs/log.md)
TOKENS_PER_VALUE = 2  # required tokens for each value of a field, and as many in all: the thesis has 32 for 15 values


@dataclass(frozen=True)
class Lengths:
    """Tokens of one example.

    Attributes:
        comment: of a comment.
        prompt: of the whole prompt.
        answer: of the answer, its end token included.
        fields: of the task, each about one choice.
        watched: tokens whose logits are kept.
    """

    comment: int
    prompt: int
    answer: int
    fields: int
    watched: int


WITHOUT_TASK = Lengths(comment=25, prompt=115, answer=50, fields=4, watched=310)  # the thesis': tasks/reddit_sentiment.yaml


@dataclass(frozen=True)
class Workload:
    """The work of a run.

    Attributes:
        answers: of the teacher.
        examples, validation, test: answers in each split.
        passes: epochs in numbers of all examples, less than the epochs where the data grow.
        epochs: in each of which the validation split is measured.
        steps: of training in all.
        batch: examples of a step.
        trials: trainings.
        lengths: tokens.
        calls: of the teacher's model, an answer.
        kept_steps: of an answer, with their logits.
        sequence: tokens the student reads of an example at most.
        body: parameters of the student's layers, without embedding and output head.
        params: of the student in all.
    """

    answers: int
    examples: int
    validation: int
    test: int
    passes: float
    epochs: int
    steps: int
    batch: int
    trials: int
    lengths: Lengths
    calls: float
    kept_steps: int
    sequence: int
    body: int
    params: int


def workload_of(config: ClusterSettings, measured: Measured | None) -> Workload:
    """The work a configuration asks for.

    Args:
        measured: whose student stands where neither task nor settings name one.

    Raises:
        UserError: the task cannot be read, or the student has no such shape.
    """
    plan = config.plan
    task = load_task(config.task) if config.task else None
    lengths, shape = _lengths(task) if task else WITHOUT_TASK, planned_student(config, task, measured)
    answers = plan.comments * config.extract.samples_per_comment
    examples, validation, test = _splits(answers, plan.examples)
    choices = lengths.fields + 1  # and the end token
    positions = choices if shape.sequence == "choices" else lengths.answer
    reader = reader_shape(shape, pretrained_folder(shape.reader))
    train = config.train.with_batch(reader is not None and reader.kind == "pretrained")
    read = lengths.comment + 1  # and a separator
    sequence = (min(read, reader.most_vectors) if reader else read) + positions - 1  # the last token is only a target
    body, params = _sizes(shape, reader, lengths.watched, sequence)
    sizes = [max(1, round(share * examples)) for share in _shares(train)]
    return Workload(
        answers=answers,
        examples=examples,
        validation=validation,
        test=test,
        passes=sum(sizes) / examples,
        epochs=train.epochs,
        steps=sum(-(-size // train.step_examples) for size in sizes),
        batch=train.step_examples,
        trials=plan.trials,
        lengths=lengths,
        calls=lengths.fields + CALLS[config.extract.capture],
        kept_steps=lengths.answer if config.extract.capture == "all" else choices,
        sequence=sequence,
        body=body,
        params=measured.params if measured and measured.params else params,
    )


def planned_student(config: ClusterSettings, task: Task | None, measured: Measured | None) -> StudentConfig:
    """The student's shape, by the task, else as measured, else the thesis'; with the run's changes.

    Raises:
        UserError: it is no shape, or another was measured.
    """
    known = measured.student if measured else None
    shape = changed_shape(task_shape(task) if task else known or THESIS, config.student)
    if known and (differ := {key for key, value in known.model_dump().items() if getattr(shape, key) != value}):
        raise UserError(
            f"{config.plan.scale} was measured with another student (its {', '.join(sorted(differ))} differ): measure this "
            "one with retort scale, or leave --scale out"
        )
    return shape


def _lengths(task: Task) -> Lengths:
    """By the task's own limits, without a tokenizer."""
    comment, values = task.comments.max_tokens, sum(len(values) for values in task.fields.values())
    return Lengths(
        comment=comment,
        prompt=TEMPLATE_TOKENS + sum(len(text) for _, text in task.turns("")) // CHARACTERS_PER_TOKEN + comment,
        answer=task.longest // CHARACTERS_PER_ANSWER_TOKEN + 1,  # the end token's
        fields=len(task.fields),
        watched=TOKENS_PER_VALUE * (values + 1) + task.auxiliary_tokens,
    )


def _splits(answers: int, examples: int | None) -> tuple[int, int, int]:
    """Answers in training, validation and test."""
    if examples:
        return examples, 0, 0
    train, validation, test = (answers * len(SPLIT_TENTHS[split]) // 10 for split in (TRAIN, VALIDATION, TEST))
    return max(1, train), validation, test


def _shares(train: TrainConfig) -> list[float]:
    """The share of the examples each epoch draws from."""
    return [train.growth[min(epoch, len(train.growth) - 1)] for epoch in range(train.epochs)]


def _sizes(shape: StudentConfig, reader: ReaderShape | None, watched: int, context: int) -> tuple[int, int]:
    """Parameters of the student's layers, a reader's among them, and of all of it."""
    full = Shape(
        input_vocabulary=EMBEDDING_ROWS,
        embeddings=watched if reader else EMBEDDING_ROWS,
        output_vocabulary=watched,
        context=context,
        separator=() if reader else None,
        reader=reader,
        **shape.sizes(),
    )
    with torch.device("meta"):
        student = Student(full)
        counts = student.parameter_counts()
    return counts["rest"] - student.head.weight.numel(), sum(counts.values())
