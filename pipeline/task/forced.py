"""The forced runs of an automaton: tokens that follow from the state alone, so no model need be asked for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.task.automaton import Automaton


@dataclass(frozen=True)
class ForcedRuns:
    """The forced tokens that follow each state up to the next choice or the end.

    Attributes:
        tokens: int64 [S, X], padded with 0.
        lengths: int64 [S]; 0 where the state is a choice.
        after: int64 [S], the choice state, or the end, that the run leads to.
    """

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    after: NDArray[np.int64]

    def of(self, state: int) -> list[int]:
        """The run that follows one state."""
        return self.tokens[state, : self.lengths[state]].tolist()


def forced_runs(automaton: Automaton, through_end: bool = True) -> ForcedRuns:
    """Tabulates the runs of every state.

    Args:
        through_end: whether a run takes the end token too, or stops before it.
    """
    runs: list[list[int]] = [[] for _ in range(automaton.states)]
    after = np.arange(automaton.states)
    for state in range(automaton.states - 2, -1, -1):  # steps lead to higher states
        column = int(np.argmax(automaton.allowed[state]))
        target = int(automaton.next_state[state, column])
        if automaton.forced[state] and (through_end or target != automaton.end):
            runs[state] = [int(automaton.tokens[column]), *runs[target]]
            after[state] = after[target]
    tokens = np.zeros((len(runs), max(map(len, runs))), np.int64)
    for state, run in enumerate(runs):
        tokens[state, : len(run)] = run
    return ForcedRuns(tokens, np.array([len(run) for run in runs]), after)
