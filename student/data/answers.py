"""Answers as values: those in the shards, and any other tokens; and whose the ones in the shards are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.base.errors import UserError
from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Values
from student.data.examples import Examples


@dataclass(frozen=True)
class Reference:
    """What students are held against, in words.

    Attributes:
        name: such as in "agreement with the teacher".
        own: such as in "equal to the teacher's".
    """

    name: str
    own: str


REFERENCES = {  # by `Manifest.answers`
    "teacher": Reference("the teacher", "the teacher's"),
    "given": Reference("the given answers", "the given ones"),
}


def teacher_answers(examples: Examples) -> list[Values]:
    """The values of the answers in the shards: the teacher's, or those given in its place.

    Raises:
        UserError: one does not fit the task.
    """
    answers = parse_all(examples.compiled, (examples.answer(i).tolist() for i in range(len(examples))))
    if any(answer is None for answer in answers):
        raise UserError("the shards hold teacher answers that do not fit their own task")
    return [answer for answer in answers if answer is not None]


def gold_answers(examples: Examples) -> list[Values | None]:
    """The values of people's labels; None where there is none."""
    return parse_all(examples.compiled, (examples.gold(i).tolist() for i in range(len(examples))))


def parse_all(compiled: CompiledTask, answers: Iterable[list[int]]) -> list[Values | None]:
    """The values of each answer's tokens; None where they are not a valid answer."""
    known: dict[tuple[int, ...], Values | None] = {}  # answers are many, different ones few

    def values(answer: tuple[int, ...]) -> Values | None:
        if answer not in known:
            ended = answer[-1:] == (compiled.tokenizer.end_id,)
            known[answer] = compiled.task.parse(compiled.tokenizer.decode(list(answer))) if ended else None
        return known[answer]

    return [values(tuple(answer)) for answer in answers]
