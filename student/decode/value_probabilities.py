"""The share of every value of a field: how likely the student finds it, given the fields before it as answered.

Where values begin with the same token, the tokens behind it decide between them. They are asked for all such values in
one more call of the model, but for those whose first token is too unlikely to be seen in four digits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.task.task import Task
from student.decode.choices import Chunks, padded
from student.decode.fields import Fields, Tree
from student.model.cache import KeyValueCache

SEEN = 0.5e-4  # a share of less is 0 to four digits

ValueProbabilities = dict[str, NDArray[np.float64]]  # by field: [N, values], in the task's order
Ask = Callable[[Chunks, KeyValueCache, NDArray[np.int64]], NDArray[np.float64]]  # probabilities [B, W] at states [B]


class ValueProbabilityWalk:
    """Gathers the value probabilities of N comments as they are decoded."""

    def __init__(self, task: Task, fields: Fields, rows: int, ask: Ask) -> None:
        self._fields, self._ask = fields, ask
        self.calls = 0
        self.value_probabilities: ValueProbabilities = {
            name: np.zeros((rows, len(values))) for name, values in task.fields.items()
        }
        for values in self.value_probabilities.values():
            if values.shape[1] == 1:
                values[:] = 1.0
        self._field_N = np.full(rows, -1)

    def note(
        self, rows: NDArray[np.int64], states: NDArray[np.int64], probability_BW: NDArray[np.float64], cache: KeyValueCache
    ) -> None:
        """Takes the value probabilities of the fields that begin here.

        Args:
            rows: [B], which comments.
            states: [B], of the choices they are at.
            cache: what was read up to these choices; it is left as it is.
        """
        fields = self._fields.by_state[states]
        begins = fields != self._field_N[rows]
        self._field_N[rows] = fields
        for state in np.unique(states[begins]):
            tree, here = self._fields.tree(int(state)), np.flatnonzero(begins & (states == state))
            self.value_probabilities[tree.field][rows[here]] = self._measure(tree, here, probability_BW, cache)

    def _measure(
        self, tree: Tree, here: NDArray[np.int64], probability_BW: NDArray[np.float64], cache: KeyValueCache
    ) -> NDArray[np.float64]:
        nodes_KBW = np.zeros((len(tree.nodes), *probability_BW[here].shape))
        nodes_KBW[0] = probability_BW[here]
        first = np.array([node.first for node in tree.nodes])
        wanted_BK = nodes_KBW[0][:, first] >= SEEN
        wanted_BK[:, 0] = False
        which, number = np.nonzero(wanted_BK)
        if len(which):
            chunks = padded([tree.nodes[k].chunk for k in number])
            states = np.array([tree.nodes[k].state for k in number])
            nodes_KBW[number, which] = self._ask(chunks, cache.select(here[which]), states)
            self.calls += 1
        value_probabilities = np.zeros((len(here), self.value_probabilities[tree.field].shape[1]))
        for value, path in tree.leaves:
            value_probabilities[:, value] += np.prod([nodes_KBW[node, :, column] for node, column in path], 0)
        return value_probabilities
