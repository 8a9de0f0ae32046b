"""Kept comments through a student to answers: what `retort predict` and the MLflow model have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.comments import Row
from pipeline.compiled import CompiledTask
from pipeline.task import Scalar
from student.decode import Decoder
from student.model import Student

BATCH = 128  # comments decoded together


@dataclass(frozen=True)
class Answer:
    """A valid answer of the task.

    Attributes:
        values: by field.
        confidence: product of the probabilities of the choices made, to six digits.
    """

    values: dict[str, Scalar]
    confidence: float


class Answerer:
    """Decodes answers under the automaton.

    Args:
        model: in evaluation mode.
        compiled: the task it was trained for.
    """

    def __init__(self, model: Student, compiled: CompiledTask) -> None:
        self._compiled = compiled
        self._decoder = Decoder(model, compiled)
        self._separator = compiled.separator if model.shape.separator is None else list(model.shape.separator)

    def answer(self, rows: list[Row]) -> list[Answer]:
        """The answers to rows that `filter_rows` kept, `BATCH` of them at most, in their order."""
        if not rows:
            return []
        decoded = self._decoder.constrained([np.array(row.tokens + self._separator, np.int32) for row in rows])
        return [self._read(*answer) for answer in zip(decoded.tokens, decoded.confidence, strict=True)]

    def _read(self, tokens: list[int], confidence: float) -> Answer:
        task = self._compiled.task
        values = task.parse(self._compiled.tokenizer.decode(tokens))
        if values is None:
            raise AssertionError("an answer decoded under the automaton does not fit the task")
        return Answer(dict(zip(task.fields, values, strict=True)), round(float(confidence), 6))
