from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.task.automaton import build
from pipeline.task.forced import forced_runs

END = 99
ANSWERS = st.sets(st.lists(st.integers(0, 4), min_size=1, max_size=6).map(tuple), min_size=1, max_size=12)


@pytest.mark.parametrize("through_end", [True, False])
@given(answers=ANSWERS)
def test_runs_follow_the_automaton_to_the_next_choice_or_the_end(through_end: bool, answers: set[tuple[int, ...]]) -> None:
    automaton = build([{((*answer, END), 1) for answer in answers}])
    runs = forced_runs(automaton, through_end)
    for state in range(automaton.states):
        current = state
        for token in runs.of(state):
            assert automaton.forced[current]
            assert through_end or token != END
            current = automaton.next_state[current, automaton.column[token]]
        assert current == runs.after[state]
        stops = current == automaton.end or not automaton.forced[current]
        assert stops or (not through_end and automaton.tokens[automaton.allowed[current]] == [END])
    assert (runs.lengths == [len(runs.of(state)) for state in range(automaton.states)]).all()
    assert np.issubdtype(runs.tokens.dtype, np.int64)
