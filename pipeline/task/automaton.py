"""The output automaton: a task's output language as a minimal DFA over the tokens of one tokenizer.

A language of at most `ENUMERATED` outputs is built from the tokens of every whole answer, which is exact by construction.
A larger one is composed field by field. That is exact for BPE tokenizers: a sequence of tokens is the BPE encoding of its
text if and only if each neighbouring pair of tokens is the encoding of theirs (Berglund and van der Merwe, "Formalizing
BPE tokenization", 2023). So the answers are cut at places in the constant text where a token ends whatever the two values
around it are; inside a piece and across a cut, all neighbours have then been seen in a real encoding.
A sample of whole answers is checked at the end, since a tokenizer's pre-tokenizer could look further than that.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.task.task import Task, Values
from pipeline.task.tokenization import TextTokenizer

ENUMERATED = 100_000
COMPILED_CHARACTERS = 30_000_000  # of the answers that are tokenized to compile a task; a minute's work
CHECKED_SAMPLE = 2_000
CHECKED_LOADED = 300  # answers that are all walked when an automaton is loaded
MAX_STATES = 200_000
MAX_CELLS = 1 << 28  # of the tables: 1 GiB

Tokens = tuple[int, ...]


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


def compile_automaton(task: Task, tokenizer: TextTokenizer) -> Automaton:
    """Compiles a task against a tokenizer.

    Raises:
        UserError: the language is too large to enumerate and cannot be composed exactly, or an answer cannot be written
            in this tokenizer; the message says what to change.
    """
    check_writable(task, tokenizer)
    if task.outputs <= ENUMERATED and task.outputs * task.longest <= COMPILED_CHARACTERS:
        return build([enumerate_answers(task, tokenizer)])
    automaton = build(compose_answers(task, tokenizer))
    check_sample(automaton, task, tokenizer)
    return automaton


def check_writable(task: Task, tokenizer: TextTokenizer) -> None:
    """Refuses constant texts and values that the tokenizer cannot give back as they are.

    Raises:
        UserError: naming the text.
    """
    texts = task.literals() + [text for values in task.value_texts() for text in values]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        if tokenizer.decode(ids).strip() != text.strip():
            raise UserError(f"the teacher's tokenizer cannot write {text!r}: it comes back as {tokenizer.decode(ids)!r}")
        named = [token for token in tokenizer.special_tokens.values() if token in text]
        if named:
            raise UserError(f"the task writes {text!r}, which holds the text of the control token {named[0]!r}")


def enumerate_answers(task: Task, tokenizer: TextTokenizer) -> set[Tokens]:
    """The tokens of every answer, end token last."""
    texts = [task.render(values) for values in task.answers()]
    return {(*ids, tokenizer.end_id) for ids in tokenizer.encode(texts)}


def compose_answers(task: Task, tokenizer: TextTokenizer) -> list[set[Tokens]]:
    """The answers as a chain of pieces, one a field: every answer is one sequence of each piece, joined.

    Raises:
        UserError: the tokens cannot be cut between two fields.
    """
    if len(task.fields) == 1:
        return [enumerate_answers(task, tokenizer)]
    if not tokenizer.is_bpe:
        raise UserError(f"the task allows {task.outputs:,} answers, and this tokenizer (not BPE) has to see each: {_ADVICE}")
    values = sum(map(len, task.fields.values()))
    if values * task.longest > COMPILED_CHARACTERS:
        raise UserError(
            f"the fields have {values:,} values to look at, each in an answer of up to {task.longest:,} characters, and at "
            f"most {COMPILED_CHARACTERS:,} characters are handled: {_ADVICE}"
        )
    last = len(task.fields) - 1
    views = [
        _encode(task, tokenizer, [{field: value} for value in range(len(values))])
        for field, values in enumerate(task.fields.values())
    ]
    cuts = [_cut(task, tokenizer, field, *views[field : field + 2]) for field in range(last)]
    return [
        {view.between(field, cuts) + ((tokenizer.end_id,) if field == last else ()) for view in some}
        for field, some in enumerate(views)
    ]


_ADVICE = "list fewer values, or split the task in two"


@dataclass(frozen=True)
class _View:
    """An answer's tokens: where each starts, in characters, its id, and where the constant text behind each field starts."""

    starts: list[int]
    ids: list[int]
    after: list[int]

    def around(self, place: int) -> Tokens:
        """The tokens before and behind a place; none where no token starts there."""
        return tuple(self.ids[self.starts.index(place) - 1 :][:2]) if place in self.starts else ()

    def between(self, field: int, cuts: list[int]) -> Tokens:
        """The tokens of a field's piece."""
        first = self.starts.index(self.after[field - 1] + cuts[field - 1]) if field else 0
        end = self.starts.index(self.after[field] + cuts[field]) if field < len(cuts) else None
        return tuple(self.ids[first:end])


def _encode(task: Task, tokenizer: TextTokenizer, choices: list[dict[int, int]]) -> list[_View]:
    """Answers with some fields' values, by their numbers; all other fields have their first."""
    literals, values = task.literals(), task.value_texts()
    texts, ends = [], []
    for chosen in choices:
        text, after = literals[0], []
        for field, texts_of_field in enumerate(values):
            text += texts_of_field[chosen.get(field, 0)]
            after.append(len(text))
            text += literals[field + 1]
        texts.append(text)
        ends.append(after)
    encoded = tokenizer.offsets(texts)
    return [_View(_starts(offsets), ids, after) for (ids, offsets), after in zip(encoded, ends, strict=True)]


def _starts(offsets: list[tuple[int, int]]) -> list[int]:
    """Where each token starts, in characters; -1 for tokens that share a character with the one before."""
    starts = [0] + [start for start, _ in offsets[1:]]
    return [s if i == 0 or offsets[i - 1][1] <= s else -1 for i, s in enumerate(starts)]


def _cut(task: Task, tokenizer: TextTokenizer, field: int, left: list[_View], right: list[_View]) -> int:
    """A place in the text between two fields, counted from its start, where a token begins whatever the two values are.

    Args:
        left: an answer for each value of the field.
        right: the same of the next one.
    """
    length = len(task.literals()[field + 1])
    common = set(range(1, length))
    for view in (*left, *right):
        common &= {start - view.after[field] for start in view.starts if start >= 0}
    for cut in sorted(common, key=lambda cut: abs(cut - length / 2)):
        if _holds(task, tokenizer, field, cut, left, right):
            return cut
    names = list(task.fields)
    raise UserError(
        f"no token boundary between the fields {names[field]!r} and {names[field + 1]!r} holds for all their values, "
        f"and {task.outputs:,} answers are too many to list: {_ADVICE}"
    )


def _holds(task: Task, tokenizer: TextTokenizer, field: int, cut: int, left: list[_View], right: list[_View]) -> bool:
    """Whether tokens that end at a cut are followed, in a real encoding, by all those that begin there."""
    before = {view.around(view.after[field] + cut)[0]: value for value, view in enumerate(left)}
    behind = {view.around(view.after[field] + cut)[1]: value for value, view in enumerate(right)}
    pairs = list(itertools.product(before.items(), behind.items()))
    if len(pairs) * task.longest > COMPILED_CHARACTERS:
        return False
    views = _encode(task, tokenizer, [{field: one, field + 1: other} for (_, one), (_, other) in pairs])
    return all(view.around(view.after[field] + cut) == (a, b) for view, ((a, _), (b, _)) in zip(views, pairs, strict=True))


def build(pieces: list[set[Tokens]]) -> Automaton:
    """The minimal DFA of all sequences that take one sequence of each piece, in order.

    Built from the last piece back to the first; two states with the same ways on are one.
    """
    states: dict[tuple[tuple[int, int], ...], int] = {(): 0}
    start = 0
    for piece in reversed(pieces):
        start = _share_suffixes(sorted(piece), start, states)
        if len(states) > MAX_STATES:
            raise UserError(f"the output automaton has more than {MAX_STATES:,} states: {_ADVICE}")
    return _tables(list(states), start)


def _share_suffixes(sequences: list[Tokens], end: int, states: dict[tuple[tuple[int, int], ...], int]) -> int:
    """Adds the states of some sorted sequences that all lead to `end`; returns the state they start from.

    Sequences are taken in order; the steps a sequence does not share with its successor are final and become states.
    """
    open_edges: list[list[tuple[int, int]]] = [[]]
    for sequence, following in itertools.pairwise([*sequences, ()]):
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
        raise UserError(f"the output automaton has {len(edges):,} states over {len(tokens):,} tokens, too many: {_ADVICE}")
    column = {int(token): i for i, token in enumerate(tokens)}
    last = len(edges) - 1
    if start != last:
        raise AssertionError("the start was not the last state added")
    next_state = np.full((len(edges), len(tokens)), -1, np.int32)
    for state, ways in enumerate(edges):
        for token, target in ways:
            next_state[last - state, column[token]] = last - target
    return Automaton(tokens, next_state)


def check_sample(automaton: Automaton, task: Task, tokenizer: TextTokenizer) -> None:
    """Walks a sample of whole answers, each field's values all among them.

    Raises:
        UserError: an answer's own tokens are not a path of the automaton.
    """
    rng = random.Random(0)
    sample: list[Values] = [tuple(rng.choice(v) for v in task.fields.values()) for _ in range(CHECKED_SAMPLE)]
    for answer in _refused(automaton, task, tokenizer, sample):
        raise UserError(f"the tokens of {task.render(answer)!r} reach across fields in this tokenizer: {_ADVICE}")


def is_of_task(automaton: Automaton, task: Task, tokenizer: TextTokenizer) -> bool:
    """Whether an automaton is a task's: it has as many answers, and among them some in which each value occurs.

    With at most `CHECKED_LOADED` answers all are among them, which is a proof. An automaton that was compiled is the
    task's in any case; this is for one that comes from a file.
    """
    if automaton.answers != task.outputs:
        return False
    values = list(task.fields.values())
    each = (tuple(v[i % len(v)] for v in values) for i in range(max(map(len, values))))
    answers = task.answers() if task.outputs <= CHECKED_LOADED else each
    return not any(_refused(automaton, task, tokenizer, list(itertools.islice(answers, CHECKED_SAMPLE))))


def _refused(automaton: Automaton, task: Task, tokenizer: TextTokenizer, answers: list[Values]) -> Iterator[Values]:
    """Those of some answers whose tokens are not a path of the automaton."""
    encoded = tokenizer.encode([task.render(values) for values in answers])
    return (v for v, ids in zip(answers, encoded, strict=True) if not automaton.accepts([*ids, tokenizer.end_id]))
