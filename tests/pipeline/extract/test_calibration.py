from __future__ import annotations

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.extract.calibration import ENOUGH_VISITS, StateMass, check_format, masses, report, suggest
from pipeline.task.automaton import Automaton
from pipeline.task.compilation import compile_automaton
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer
from pipeline.teacher.capture import CensusResult
from tests.conftest import END_ID


def state(written: str = '{"a": "', mass: float = 0.5, visits: int = 100, rival: str = "x") -> StateMass:
    return StateMass(written, mass, visits, rival)


@pytest.mark.parametrize(("mass", "stops"), [(0.89, True), (0.9, False), (0.91, False), (0.0, True), (1.0, False)])
def test_the_floor(mass: float, stops: bool) -> None:
    if stops:
        with pytest.raises(UserError, match=rf"only {mass:.3f} .*\(floor 0\.9\)"):
            check_format([state(mass=mass)], 0.9, given=False)
    else:
        check_format([state(mass=mass)], 0.9, given=False)


def test_it_is_a_warning_where_the_answers_are_given(caplog: pytest.LogCaptureFixture) -> None:
    check_format([state(mass=0.1)], 0.9, given=True)
    assert "the given answers are kept" in caplog.text
    assert "--set train.objective=hard-label" in caplog.text


def test_states_seldom_visited_do_not_count() -> None:
    check_format([state(mass=0.0, visits=ENOUGH_VISITS - 1)], 0.9, given=False)
    with pytest.raises(UserError):
        check_format([state(mass=0.0, visits=ENOUGH_VISITS)], 0.9, given=False)


def test_the_floor_may_be_zero_and_nothing_visited() -> None:
    check_format([state(mass=0.0)], 0.0, given=False)
    check_format([], 0.9, given=False)


def test_the_earliest_state_is_named_and_all_are_counted() -> None:
    found = [state('{"a": "b", "', 0.1, rival="late"), state("{", 0.8, rival="\n  ")]
    with pytest.raises(UserError, match=r"after '\{' .*write '\\n  '.*format\.indent.*2 states are under the floor"):
        check_format(found, 0.9, given=False)


@pytest.mark.parametrize(
    ("written", "rival", "key"),
    [
        ("", "```", "format.prefix to '```json"),
        ("", "Sure", "format.prefix"),
        ("{", "\n", "format.indent"),
        ('{"a": "x",', "\n  ", "format.indent"),
        ('{"a":', '"', "format.key_separator"),
        ('{"a"', " :", "format.key_separator"),
        ('{"a": "x"}', "\n", "format.suffix to what it ends its answers with"),
        ('{"a": "', "other", "instruction"),
    ],
)
def test_the_suggestion_fits_what_the_teacher_prefers(written: str, rival: str, key: str) -> None:
    assert key in suggest(state(written, rival=rival))


def compiled(tokenizer: TextTokenizer) -> Automaton:
    content = {"name": "t", "teacher": "none", "instruction": "Judge.", "comments": {"max_tokens": 5}}
    return compile_automaton(Task.model_validate(content | {"fields": {"a": ["a", "ab", "joy"], "b": [1, 12]}}), tokenizer)


def result(automaton: Automaton, visited: dict[int, float], preferred: int) -> CensusResult:
    mass, visits = np.ones(automaton.states), np.zeros(automaton.states, np.int64)
    for at, value in visited.items():
        mass[at], visits[at] = value, 20
    return CensusResult(np.zeros(10), mass, visits, dict.fromkeys(visited, preferred))


def test_masses_lists_visited_states_least_first(any_tokenizer: TextTokenizer) -> None:
    automaton = compiled(any_tokenizer)
    joy = any_tokenizer.encode(["joy"])[0][-1]
    found = masses(result(automaton, {0: 0.95, 1: 0.5, 2: 0.7}, joy), automaton, any_tokenizer)
    assert [item.mass for item in found] == [0.5, 0.7, 0.95]
    assert (found[-1].written, found[-1].visits) == ("", 20)
    assert found[0].rival == any_tokenizer.decode([joy])


def test_every_state_is_shown_with_a_text_that_leads_there(bpe_tokenizer: TextTokenizer) -> None:
    automaton = compiled(bpe_tokenizer)
    found = masses(result(automaton, dict.fromkeys(range(automaton.states), 0.5), 7), automaton, bpe_tokenizer)
    answers = ['{"a": "%s", "b": %s}' % (a, b) for a in ("a", "ab", "joy") for b in (1, 12)]  # noqa: UP031
    assert len(found) == automaton.states
    for item in found:
        assert any(answer.startswith(item.written) for answer in answers)


def test_a_control_token_is_named_as_the_rival(tokenizer: TextTokenizer) -> None:
    automaton = compiled(tokenizer)
    (found,) = masses(result(automaton, {0: 0.5}, END_ID), automaton, tokenizer)
    assert found.rival == "<end_of_turn>"


def test_the_report_is_plain_data() -> None:
    assert report([state("{", 0.25, 20, "x")], rows=64) == {
        "rows": 64,
        "states": [{"written": "{", "mass": 0.25, "visits": 20, "rival": "x"}],
    }
