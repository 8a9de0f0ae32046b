"""A task's automaton as decoding needs it: what is asked at each choice, what is read after it, and what it spells."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.task.compiled import CompiledTask
from pipeline.task.forced import forced_runs

LEFT = -1  # the state of an answer that has left the automaton
NONE = -1  # in a trail, where there was no choice any more

Chunks = tuple[NDArray[np.int64], NDArray[np.int64]]  # token ids [B, T], padded with 0, and lengths [B]
Trail = NDArray[np.int32]  # the columns of the watched set chosen one after another, `NONE` behind the last


class Choices:
    """Choice after choice through the automaton, forced tokens taken along.

    Shape suffixes: S states, W watched tokens, X tokens of the longest forced run.

    Args:
        forced_read: whether forced tokens are read by the model; a student of choices never sees them.

    Attributes:
        first: the state of the first choice, or the end.
        end: the automaton's last state.
        opening: int64, forced tokens before the first choice that the model reads.
        allowed_SW: bool, the columns each state allows; auxiliary ones never.
        chunks_SX: int64, what is read after a choice that led to a state, but the choice itself.
        lengths_S: int64, of these.
    """

    def __init__(self, compiled: CompiledTask, forced_read: bool) -> None:
        self._compiled, automaton = compiled, compiled.automaton
        self.watched = compiled.watched.tokens.astype(np.int64)
        self._runs = runs = forced_runs(automaton)
        self.first, self.end = int(runs.after[0]), automaton.end
        table = np.pad(automaton.next_state, [(0, 0), (0, len(self.watched) - len(automaton.tokens))], constant_values=LEFT)
        self.allowed_SW, self._targets_SW = table != LEFT, table
        self.chunks_SX = runs.tokens if forced_read else runs.tokens[:, :0]
        self.lengths_S = runs.lengths if forced_read else np.zeros_like(runs.lengths)
        self.opening = self.chunks_SX[0, : self.lengths_S[0]]
        self._spelt: dict[bytes, list[int]] = {}

    @cached_property
    def most(self) -> int:
        """Choices of the longest way through the automaton."""
        count = np.zeros(self.end + 1, np.int64)
        for state in range(self.end - 1, -1, -1):  # steps lead to higher states
            following = self._runs.after[self._targets_SW[state][self.allowed_SW[state]]]
            count[state] = (len(following) > 1) + count[following].max()
        return int(count[0])

    def targets(self, states: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """The states that columns lead to, before any forced token; `LEFT` where a state does not allow its column."""
        return self._targets_SW[states, columns].astype(np.int64)

    def after(self, targets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The next choice's state, or the end, behind the forced tokens; `LEFT` stays."""
        return np.where(targets == LEFT, LEFT, self._runs.after[targets])

    def step(self, state: int, column: int) -> int:
        """The next choice's state, or the end, after one allowed column."""
        return int(self._runs.after[self._targets_SW[state, column]])

    def chunk(self, state: int, column: int) -> NDArray[np.int64]:
        """What is read after one allowed column: its token, and the forced ones behind it."""
        target = self._targets_SW[state, column]
        return np.array([self.watched[column], *self.chunks_SX[target, : self.lengths_S[target]]])

    def chunks(self, columns: NDArray[np.int64], targets: NDArray[np.int64]) -> Chunks:
        """The same of many rows: the columns, and the states they led to."""
        tokens = np.concatenate([self.watched[columns, None], self.chunks_SX[targets]], 1)
        lengths = 1 + self.lengths_S[targets]
        return tokens[:, : lengths.max()], lengths

    def spell(self, trail: Trail) -> list[int]:
        """All tokens of the answer that a trail stands for; with one that leaves the automaton it breaks off."""
        key = trail.tobytes()
        if key not in self._spelt:  # comments are many, answers few
            self._spelt[key] = self._walk(trail)
        return self._spelt[key]

    def _walk(self, trail: Trail) -> list[int]:
        state, tokens = self.first, self._runs.of(0)
        for column in trail[trail != NONE]:
            tokens.append(int(self.watched[column]))
            target = int(self._targets_SW[state, column])
            if target == LEFT:
                break
            tokens += self._runs.of(target)
            state = int(self._runs.after[target])
        return tokens


def padded(chunks: Sequence[NDArray[np.integer]]) -> Chunks:
    """Chunks side by side."""
    lengths = np.array([len(chunk) for chunk in chunks])
    tokens = np.zeros((len(chunks), lengths.max()), np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(chunks)
    return tokens, lengths
