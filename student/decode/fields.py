"""Which choices of an answer decide which field, and how the field's values are spelt in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Values, labels_of
from student.decode.choices import Choices

Path = tuple[tuple[int, int], ...]  # choices as (node, column)


@dataclass(frozen=True)
class Node:
    """A choice within a field.

    Attributes:
        state: of the automaton.
        first: the column taken at the field's first choice to get here; -1 for that choice itself.
        chunk: int64, what the model reads from the field's first choice up to here.
    """

    state: int
    first: int
    chunk: NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """All ways through the choices of one field, from one state on.

    Attributes:
        field: its name.
        nodes: the choices, the first one first.
        leaves: the index of a value and the choices that spell it, one leaf or more for each value.
    """

    field: str
    nodes: list[Node]
    leaves: list[tuple[int, Path]]


class Fields:
    """The fields of a task, by the choices that decide them."""

    def __init__(self, compiled: CompiledTask, choices: Choices) -> None:
        self._compiled, self._choices = compiled, choices
        self._trees: dict[int, Tree] = {}
        self._spelt: dict[tuple[int, ...], Values] = {}
        self._labels: dict[tuple[int, tuple[int, ...]], list[int]] = {}

    @cached_property
    def by_state(self) -> NDArray[np.int64]:
        """The index of the field that each choice's state decides: the first in which its ways on differ; elsewhere -1."""
        fields, choices = np.full(self._choices.end + 1, -1, np.int64), self._choices
        looked_at = None if self._compiled.task.optional else 2  # else any two ways on differ in the same field
        for state in sorted(self._ways, reverse=True):  # steps lead to higher states
            columns = list(map(int, np.flatnonzero(choices.allowed_SW[state])[:looked_at]))
            values = [list(map(repr, self._values([*self._ways[state], column]))) for column in columns]
            differ = next((i for i, found in enumerate(zip(*values, strict=True)) if len(set(found)) > 1), len(values[0]))
            later = [int(fields[following]) for column in columns if (following := choices.step(state, column)) != choices.end]
            fields[state] = min([differ, *later]) if looked_at is None else differ
        return fields

    def temperatures(self, by_field: dict[str, float] | None) -> NDArray[np.float32]:
        """What the logits at every state are divided by: float32 [S], 1 where no field's temperature is given."""
        if not by_field:
            return np.ones(self._choices.end + 1, np.float32)
        of_field = np.array([by_field.get(name, 1.0) for name in self._compiled.task.fields], np.float32)
        return np.where(self.by_state >= 0, of_field[self.by_state], np.float32(1))

    @cached_property
    def _ways(self) -> dict[int, list[int]]:
        """One way to each choice: the columns taken at the choices before it."""
        choices = self._choices
        ways: dict[int, list[int]] = {choices.first: []} if choices.first != choices.end else {}
        for state in range(choices.end):  # steps lead to higher states
            if state in ways:
                for column in np.flatnonzero(choices.allowed_SW[state]):
                    following = choices.step(state, int(column))
                    if following != choices.end:
                        ways.setdefault(following, [*ways[state], int(column)])
        return ways

    def values_after(self, root: int, path: tuple[int, ...]) -> Values:
        """The values of one answer that goes on by these columns from a choice on."""
        return self._values([*self._ways[root], *path])

    def _values(self, columns: list[int]) -> Values:
        """The values of one answer that begins with these choices, lists as they are spelt."""
        choices, state = self._choices, self._choices.first
        for column in columns:
            state = choices.step(state, column)
        while state != choices.end:
            columns = [*columns, int(choices.allowed_SW[state].argmax())]
            state = choices.step(state, columns[-1])
        return self.spelt(choices.spell(np.array(columns, np.int32)))

    def tree(self, state: int) -> Tree:
        """The ways through a field whose first choice this state is."""
        if state not in self._trees:
            self._trees[state] = self._grow(state)
        return self._trees[state]

    def spelt(self, tokens: list[int]) -> Values:
        """The values of a whole answer, lists as they are spelt."""
        key = tuple(tokens)
        if key not in self._spelt:  # comments are many, answers few
            values = self._compiled.task.written(self._compiled.tokenizer.decode(tokens))
            if values is None:
                raise AssertionError("the automaton spells an answer that does not fit the task")
            self._spelt[key] = values
        return self._spelt[key]

    def labels(self, root: int, path: tuple[int, ...]) -> list[int]:
        """The numbers of the labels in a list, by the columns that spell it from its first choice on."""
        key = (root, path)
        if key not in self._labels:
            field = int(self.by_state[root])
            allowed = list(self._compiled.task.fields.values())[field]
            labels = labels_of(self.values_after(root, path)[field])
            self._labels[key] = [i for i, other in enumerate(allowed) if any(_same(label, other) for label in labels)]
        return self._labels[key]

    def _grow(self, root: int) -> Tree:
        choices, field = self._choices, int(self.by_state[root])
        name, allowed = list(self._compiled.task.fields.items())[field]
        grown: list[tuple[Node, Path]] = [(Node(root, -1, np.zeros(0, np.int64)), ())]
        leaves = []
        for number, (node, path) in enumerate(grown):  # grows on the way
            for column in map(int, np.flatnonzero(choices.allowed_SW[node.state])):
                following, further = choices.step(node.state, column), (*path, (number, column))
                if following != choices.end and self.by_state[following] == field:
                    chunk = np.concatenate([node.chunk, choices.chunk(node.state, column)])
                    grown.append((Node(following, further[0][1], chunk), further))
                else:
                    value = self.values_after(root, tuple(c for _, c in further))[field]
                    leaves.append((next(i for i, other in enumerate(allowed) if _same(value, other)), further))
        return Tree(name, [node for node, _ in grown], leaves)


def _same(one: object, other: object) -> bool:
    return repr(one) == repr(other)  # JSON tells true from 1, also within lists
