"""The output automaton: a task's output language as a minimal DFA over the tokens of one tokenizer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer
from pipeline.task.values import Values

CHECKED_SAMPLE = 2_000  # of more answers than that
CHECKED_LOADED = 300  # answers that are all walked when an automaton is loaded
MAX_STATES = 200_000
MAX_CELLS = 1 << 28  # of the tables: 1 GiB
ADVICE = "list fewer values, or split the task in two"

Tokens = tuple[int, ...]
Piece = set[tuple[Tokens, int]]  # sequences, each with the number of the piece that it leads to, or of the end


@dataclass(frozen=True)
class Automaton:
    """Dense tables of the DFA. State 0 is the start, the last state the end, reached by the end token alone.

    Attributes:
        tokens: int32 [R], the required tokens' ids, ascending.
        next_state: int32 [S, R], the state a token leads to; -1 where the state does not allow it.
    """

    tokens: NDArray[np.int32]
    next_state: NDArray[np.int32]

    @property
    def states(self) -> int:
        """Number of states, start and end included."""
        return len(self.next_state)

    @property
    def end(self) -> int:
        """The state after the end token."""
        return self.states - 1

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens each state allows: bool [S, R]."""
        return self.next_state >= 0

    @cached_property
    def forced(self) -> NDArray[np.bool_]:
        """Which states allow exactly one token: bool [S]."""
        return self.allowed.sum(axis=1) == 1

    @cached_property
    def remaining(self) -> NDArray[np.int32]:
        """The longest way from each state to the end, in tokens: int32 [S]."""
        longest = np.zeros(self.states, np.int32)
        for state in range(self.states - 2, -1, -1):  # states are numbered so that every step leads to a higher one
            longest[state] = 1 + longest[self.next_state[state][self.allowed[state]]].max()
        return longest

    @property
    def longest(self) -> int:
        """Tokens of the longest answer, end token included."""
        return int(self.remaining[0])

    @cached_property
    def column(self) -> dict[int, int]:
        """Where each required token stands in the tables."""
        return {int(token): i for i, token in enumerate(self.tokens)}

    def walk(self, answer: Iterable[int]) -> list[int]:
        """The states an answer passes, the start first; one more than it has tokens.

        Raises:
            ValueError: a token leaves the automaton.
        """
        states = [0]
        for token in answer:
            column = self.column.get(int(token))
            state = -1 if column is None else int(self.next_state[states[-1], column])
            if state < 0:
                raise ValueError(f"token {token} is not allowed after {len(states) - 1} tokens")
            states.append(state)
        return states

    def states_before(self, answers: Iterable[NDArray[np.int32]]) -> NDArray[np.int64]:
        """The state before each step of each answer, one answer after another: int64 [M]."""
        seen: dict[bytes, list[int]] = {}  # comments are many, answers few
        states: list[int] = []
        for answer in answers:
            key = answer.tobytes()
            if key not in seen:
                seen[key] = self.walk(answer)[:-1]
            states += seen[key]
        return np.array(states, np.int64)

    def save(self, path: str) -> None:
        """Writes the tables as safetensors."""
        storage.write_bytes(path, save_tensors({"tokens": self.tokens, "next_state": self.next_state}))

    @staticmethod
    def load(path: str) -> Automaton:
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or its tables are not an automaton.
        """
        automaton = Automaton(**storage.read_tensors(path, {"tokens": (np.int32, 1), "next_state": (np.int32, 2)}))
        if not automaton.is_sound:
            raise UserError(f"{path} is damaged: its tables lead nowhere, in a circle, or out of the automaton")
        return automaton

    @property
    def is_sound(self) -> bool:
        """Whether the tables fit each other, each state but the last allows a token, and each step leads to a higher state."""
        tokens, table, states = self.tokens, self.next_state, self.states
        if states < 2 or table.shape[1] != len(tokens) or not len(tokens) or tokens[0] < 0:
            return False
        higher = (table > np.arange(states)[:, None]) & (table < states)
        ways: NDArray[np.bool_] = np.any(self.allowed, axis=1)
        return bool((tokens[1:] > tokens[:-1]).all() and (higher | (table == -1)).all() and ways[:-1].all() and not ways[-1])

    @property
    def answers(self) -> int:
        """How many answers lead from the start to the end."""
        ways = [0] * (self.states - 1) + [1]
        for state in range(self.states - 2, -1, -1):  # steps lead to higher states
            ways[state] = sum(ways[target] for target in self.next_state[state][self.allowed[state]].tolist())
        return ways[0]

    def accepts(self, answer: Iterable[int]) -> bool:
        """Whether an answer's tokens, end token included, lead from the start to the end."""
        try:
            return self.walk(answer)[-1] == self.end
        except ValueError:
            return False


def build(pieces: Sequence[Piece]) -> Automaton:
    """The minimal DFA of all ways from the first piece to the end, each along one sequence of every piece it passes.

    Built from the last piece back to the first; two states with the same ways on are one.

    Raises:
        UserError: it is too large.
    """
    states: dict[tuple[tuple[int, int], ...], int] = {(): 0}
    starts = [0] * (len(pieces) + 1)
    for number in reversed(range(len(pieces))):
        sequences = sorted((tokens, starts[following]) for tokens, following in pieces[number])
        starts[number] = _share_suffixes(sequences, states)
        if len(states) > MAX_STATES:
            raise UserError(f"the output automaton has more than {MAX_STATES:,} states: {ADVICE}")
    return _tables(list(states), starts[0])


def _share_suffixes(sequences: list[tuple[Tokens, int]], states: dict[tuple[tuple[int, int], ...], int]) -> int:
    """Adds the states of some sorted sequences, each with the state it leads to; returns the state they start from.

    None begins like another one whole. Sequences are taken in order; the steps a sequence does not share with its successor are
    final and become states.
    """
    open_edges: list[list[tuple[int, int]]] = [[]]
    for (sequence, end), (following, _) in itertools.pairwise([*sequences, ((), 0)]):
        shared = _shared_prefix(sequence, following)
        open_edges += [[] for _ in range(len(sequence) - len(open_edges) + 1)]
        state = end
        for depth in range(len(sequence) - 1, shared - 1, -1):
            open_edges[depth].append((sequence[depth], state))
            if depth > shared or not following:
                state = states.setdefault(tuple(open_edges[depth]), len(states))
                open_edges[depth] = []
    return state


def _shared_prefix(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tables(edges: list[tuple[tuple[int, int], ...]], start: int) -> Automaton:
    """Dense tables, states renumbered so that the start is 0, the end last, and every step leads to a higher number.

    A state was added after all it leads to, so the reverse of the order they were added in has that property.
    """
    tokens = np.array(sorted({token for state in edges for token, _ in state}), np.int32)
    if len(edges) * len(tokens) > MAX_CELLS:
        raise UserError(f"the output automaton has {len(edges):,} states over {len(tokens):,} tokens, too many: {ADVICE}")
    column = {int(token): i for i, token in enumerate(tokens)}
    last = len(edges) - 1
    if start != last:
        raise AssertionError("the start was not the last state added")
    next_state = np.full((len(edges), len(tokens)), -1, np.int32)
    for state, ways in enumerate(edges):
        for token, target in ways:
            next_state[last - state, column[token]] = last - target
    return Automaton(tokens, next_state)


def is_of_task(automaton: Automaton, task: Task, tokenizer: TextTokenizer) -> bool:
    """Whether an automaton is a task's: it has as many answers, and among them some in which each value occurs.

    With at most `CHECKED_LOADED` answers all are among them, which is a proof. An automaton that was compiled is the
    task's in any case; this is for one that comes from a file.
    """
    if automaton.answers != task.outputs:
        return False
    rng = random.Random(0)
    most = max(*map(len, task.fields.values()), *(len(one.values) for one in task.combinations), 1)
    answers = task.answers() if task.outputs <= CHECKED_LOADED else (task.draw(rng, place) for place in range(most))
    return not any(refused(automaton, task, tokenizer, list(itertools.islice(answers, CHECKED_SAMPLE))))


def refused(automaton: Automaton, task: Task, tokenizer: TextTokenizer, answers: list[Values]) -> Iterator[Values]:
    """Those of some answers whose tokens are not a path of the automaton."""
    encoded = tokenizer.encode([task.render(values) for values in answers])
    return (v for v, ids in zip(answers, encoded, strict=True) if not automaton.accepts([*ids, tokenizer.end_id]))
