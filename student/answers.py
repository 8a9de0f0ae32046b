"""Answers as values: the teacher's in the shards, and any other tokens."""

from __future__ import annotations

from pipeline.compiled import CompiledTask
from pipeline.errors import UserError
from pipeline.task import Values
from student.examples import Examples


def teacher_answers(examples: Examples) -> list[Values]:
    """The values of the teacher's answers.

    Raises:
        UserError: one does not fit the task.
    """
    answers = parse_all(examples.compiled, [examples.answer(i).tolist() for i in range(len(examples))])
    if any(answer is None for answer in answers):
        raise UserError("the shards hold teacher answers that do not fit their own task")
    return [answer for answer in answers if answer is not None]


def parse_all(compiled: CompiledTask, answers: list[list[int]]) -> list[Values | None]:
    """The values of each answer's tokens; None where they are not a valid answer."""
    known: dict[tuple[int, ...], Values | None] = {}  # answers are many, different ones few
    for answer in map(tuple, answers):
        if answer not in known:
            ended = answer[-1:] == (compiled.tokenizer.end_id,)
            known[answer] = compiled.task.parse(compiled.tokenizer.decode(list(answer))) if ended else None
    return [known[tuple(answer)] for answer in answers]
