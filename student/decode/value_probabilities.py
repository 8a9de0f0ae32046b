"""The share of every value of a field: how likely the student finds it, given the fields before it as answered.

Where values begin with the same token, the tokens behind it decide between them. They are asked for all such values in
one more call of the model, but for those whose first token is too unlikely to be seen in four digits.

Of a field that is a list, the share of a label is how likely it is to be in the list: the sum over the lists that hold it. They
are found label by label, one call for each step of the longest. Ways on that are less likely than `LIKELY` are left out, and
their shares go to those beside them. So it is done for fields that an answer may leave out, from the field before them on: a
token may end its value and the answer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.task.task import Task
from pipeline.task.values import Values, labels_of
from student.decode.choices import Choices, Chunks, padded
from student.decode.fields import Fields, Tree
from student.model.cache import KeyValueCache

SEEN = 0.5e-4  # a share of less is 0 to four digits
LIKELY = 0.02  # of the beginning of a list
ASKED = 1024  # beginnings of lists at once

ValueProbabilities = dict[str, NDArray[np.float64]]  # by field: [N, values], in the task's order
Ask = Callable[[Chunks, KeyValueCache, NDArray[np.int64]], NDArray[np.float64]]  # probabilities [B, W] at states [B]


class _Beginning(NamedTuple):
    """Of a list, at its next choice.

    Attributes:
        row: which of the texts.
        state: of the automaton.
        path: the columns taken since the list's first choice.
        chunk: what the model reads since then.
        share: how likely it is.
    """

    row: int
    state: int
    path: tuple[int, ...]
    chunk: NDArray[np.int64]
    share: float


def _left_out_behind(task: Task) -> dict[int, int]:
    """By each field that is always there, before some that are not, the last of these."""
    optional, found, before = [name in task.optional for name in task.fields], dict[int, int](), None
    for place, may in enumerate(optional):
        if not may:
            before = place
        elif before is not None:
            found[before] = place
    return found


class ValueProbabilityWalk:
    """Gathers the value probabilities of N comments as they are decoded."""

    def __init__(self, task: Task, fields: Fields, choices: Choices, rows: int, ask: Ask) -> None:
        self._fields, self._choices, self._ask = fields, choices, ask
        self._names, self._lists = list(task.fields), task.lists
        self._places = {name: {repr(value): i for i, value in enumerate(values)} for name, values in task.fields.items()}
        self.calls = 0
        self.value_probabilities: ValueProbabilities = {
            name: np.zeros((rows, len(values))) for name, values in task.fields.items()
        }
        self._field_N = np.full(rows, -1)
        self._last = _left_out_behind(task)
        self._together: list[tuple[int, int, list[tuple[float, Values]]]] = []  # row, field, values from there on and shares

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
        for state in map(int, np.unique(states[begins])):
            name, here = self._names[self._fields.by_state[state]], np.flatnonzero(begins & (states == state))
            if name in self._lists:
                found = self._list(state, here, probability_BW, cache)
            else:
                found = self._measure(self._fields.tree(state), here, probability_BW, cache)
            self.value_probabilities[name][rows[here]] = found
            self._follow(state, here, rows, probability_BW, cache)

    def settle(self, answers: list[list[int]]) -> ValueProbabilities:
        """The shares, once all is answered; of a field that left no choice, the answer has all.

        Args:
            answers: their tokens.
        """
        for field, (name, shares_NV) in enumerate(self.value_probabilities.items()):
            for row in np.flatnonzero(~shares_NV.any(1)):
                for label in labels_of(self._fields.spelt(answers[row])[field]):
                    shares_NV[row, self._places[name][repr(label)]] = 1.0
        for row, field, found in self._together:
            told = self._fields.spelt(answers[row])
            for place in range(field + 1, self._last[field] + 1):
                found = [(share, values) for share, values in found if repr(values[place - 1]) == repr(told[place - 1])]
                shares_V, places = self.value_probabilities[self._names[place]][row], self._places[self._names[place]]
                shares_V[:] = np.bincount([places[repr(v[place])] for _, v in found], [s for s, _ in found], len(shares_V))
                shares_V /= shares_V.sum()
        return self.value_probabilities

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

    def _list(
        self, root: int, here: NDArray[np.int64], probability_BW: NDArray[np.float64], cache: KeyValueCache
    ) -> NDArray[np.float64]:
        """The share of each label being in a list that begins here."""
        field = int(self._fields.by_state[root])
        shares = np.zeros((len(here), self.value_probabilities[self._names[field]].shape[1]))
        for row, path, share in self._likely(root, field, here, probability_BW, cache):
            shares[row, self._fields.labels(root, path)] += share
        return shares

    def _follow(
        self,
        root: int,
        here: NDArray[np.int64],
        rows: NDArray[np.int64],
        probability_BW: NDArray[np.float64],
        cache: KeyValueCache,
    ) -> None:
        """Finds what the answers may go on with that begin a field here, where those behind it may be left out."""
        field = int(self._fields.by_state[root])
        if field in self._last:
            found = [list[tuple[float, Values]]() for _ in here]
            for row, path, share in self._likely(root, self._last[field], here, probability_BW, cache):
                found[row].append((share, self._fields.values_after(root, path)))
            self._together += [(int(rows[i]), field, ways) for i, ways in zip(here, found, strict=True)]

    def _likely(
        self, root: int, last: int, here: NDArray[np.int64], probability_BW: NDArray[np.float64], cache: KeyValueCache
    ) -> Iterator[tuple[int, tuple[int, ...], float]]:
        """The likely ways from a choice on until some field is decided: which of the texts, the columns, the share."""
        begun = [_Beginning(row, root, (), np.zeros(0, np.int64), 1.0) for row in range(len(here))]
        asked = probability_BW[here]
        while begun:
            further = list[_Beginning]()
            for one, probability_W in zip(begun, asked, strict=True):
                for column, share in self._ways_on(one, probability_W):
                    state, path = self._choices.step(one.state, column), (*one.path, column)
                    if state != self._choices.end and self._fields.by_state[state] <= last:
                        chunk = np.concatenate([one.chunk, self._choices.chunk(one.state, column)])
                        further.append(_Beginning(one.row, state, path, chunk, share))
                    else:
                        yield one.row, path, share
            begun, asked = further, self._ask_all(further, here, cache)

    def _ways_on(self, begun: _Beginning, probability_W: NDArray[np.float64]) -> list[tuple[int, float]]:
        """The columns that a beginning goes on by, with how likely it then is: the best one, and all that are worth a call."""
        likely = np.flatnonzero(begun.share * probability_W >= min(LIKELY, begun.share * probability_W.max()))
        shares = begun.share * probability_W[likely] / probability_W[likely].sum()
        return list(zip(likely.tolist(), shares.tolist(), strict=True))

    def _ask_all(self, begun: list[_Beginning], here: NDArray[np.int64], cache: KeyValueCache) -> NDArray[np.float64]:
        """The probabilities at the next choice of each beginning: [N, W]."""
        asked = []
        for some in (begun[i : i + ASKED] for i in range(0, len(begun), ASKED)):
            rows, states = np.array([one.row for one in some]), np.array([one.state for one in some])
            asked.append(self._ask(padded([one.chunk for one in some]), cache.select(here[rows]), states))
            self.calls += 1
        return np.concatenate(asked) if asked else np.zeros((0, 0))
