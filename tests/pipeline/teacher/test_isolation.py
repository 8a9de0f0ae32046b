from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.teacher.isolation import BARREN, isolate
from pipeline.teacher.process import EngineError


class Engine:
    """Echoes rows; dies of those it is told to, and at the calls it is told to."""

    def __init__(self, deadly: set[int], accidents: set[int] = frozenset()) -> None:
        self.deadly, self.accidents, self.calls = deadly, accidents, 0

    def __call__(self, rows: list[int]) -> list[int]:
        self.calls += 1
        if self.calls in self.accidents or self.deadly & set(rows):
            raise EngineError("it died")
        return [row * 10 for row in rows]


def check(engine: Engine, rows: list[int], poison: set[int]) -> None:
    found = isolate(engine, rows)
    assert set(found.poison) == {i for i, row in enumerate(rows) if row in poison}
    answered = {i: result for indices, results in found.parts for i, result in zip(indices, results, strict=True)}
    assert answered == {i: row * 10 for i, row in enumerate(rows) if row not in poison}


@given(count=st.integers(0, 70), deadly=st.sets(st.integers(0, 69), max_size=2))
def test_rows_that_kill_are_found_and_all_others_answered(count: int, deadly: set[int]) -> None:
    check(Engine(deadly), list(range(count)), deadly)


@given(count=st.integers(1, 40), accidents=st.sets(st.integers(1, 12), max_size=1))
def test_an_engine_that_dies_of_something_else_costs_no_row(count: int, accidents: set[int]) -> None:
    check(Engine(set(), accidents), list(range(count)), set())


def test_one_poison_row_costs_few_calls() -> None:
    engine = Engine({300})
    check(engine, list(range(512)), {300})
    assert engine.calls <= 2 * 9 + 3


def test_an_engine_that_answers_nothing_is_given_up() -> None:
    engine = Engine(set(range(512)))
    with pytest.raises(UserError, match="the engine fails on one row after another, the last time so: it died"):
        isolate(engine, list(range(512)))
    assert engine.calls < 9 + 4 * BARREN


def test_a_teacher_that_cannot_start_is_not_tried_again() -> None:
    def start(_rows: list[int]) -> None:
        raise UserError("cannot start")

    with pytest.raises(UserError, match="cannot start"):
        isolate(start, [1, 2, 3])
