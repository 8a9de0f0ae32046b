"""What a teacher beside a student has answered, with what a shard keeps of it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Value
from pipeline.teacher.capture import Captured
from student.data.answers import parse_all


@dataclass(frozen=True)
class Recorded:
    """Answers to some of the texts that a teacher was asked about.

    Attributes:
        places: of these texts among all.
        captured: their answers, in that order.
    """

    places: list[int]
    captured: Captured

    def by_text(self, count: int, compiled: CompiledTask) -> list[dict[str, Value] | None]:
        """The answer to each of `count` texts, by field; None where there is none of the task's."""
        answers: list[dict[str, Value] | None] = [None] * count
        tokens = [row[:length].tolist() for row, length in zip(self.captured.tokens, self.captured.lengths, strict=True)]
        for i, values in zip(self.places, parse_all(compiled, tokens), strict=True):
            answers[i] = dict(zip(compiled.task.fields, values, strict=True)) if values else None
        return answers
