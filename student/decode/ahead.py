"""All choices that an answer may come to, read with the comment in one call of the model.

Up to some hundred tokens, a call of a small model costs what surrounds its operations, however many tokens it reads. So where
the choices of a task are few, one comment alone is answered in one call instead of one a choice: what may be read is laid out
as a tree behind the comment, and each token attends to the comment and to its own way there. The idea is that of tree
attention in speculative decoding (Miao et al., "SpecInfer", 2024); here the tree holds everything, and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from student.decode.choices import Choices

LEAF = -1  # instead of a node: the answer is whole
MOST_TOKENS = 1024  # of a tree
WORTH = {"cpu": 1e8, "cuda": 1e11}  # floating-point operations that take about as long as the calls they save


@dataclass(frozen=True, eq=False)
class ChoiceTree:
    """What a student may read behind a comment. N tokens, K nodes, R required tokens.

    Attributes:
        states: int64 [K], of the choice at each node; node 0 is the first, right behind the comment.
        child_KR: int64, the node a column leads to; `LEAF` at the end of an answer.
        last: int64 [K], the token after which a node chooses; -1 is the comment's last.
        tokens: int64 [N].
        places: int64 [N], how far behind the comment each token is.
        visible_NN: bool, which tokens each token looks at: those on its way, and itself.
    """

    states: NDArray[np.int64]
    child_KR: NDArray[np.int64]
    last: NDArray[np.int64]
    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    visible_NN: NDArray[np.bool_]

    def mask(self, comment: int) -> torch.Tensor:
        """The same with so many tokens of a comment before them, to be added to scores: float32 [T, T], 0 or -∞."""
        return _mask(self, comment)

    def follow(self, column_K: NDArray[np.int64]) -> list[int]:
        """The nodes of an answer that takes this column at each node."""
        nodes, node = list[int](), 0
        while node != LEAF:
            nodes.append(node)
            node = int(self.child_KR[node, column_K[node]])
        return nodes


@lru_cache(256)
def _mask(tree: ChoiceTree, comment: int) -> torch.Tensor:
    total = comment + len(tree.tokens)
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    visible[comment:, comment:] = torch.from_numpy(tree.visible_NN)
    return torch.zeros(total, total).masked_fill(~visible, -torch.inf)  # of bools, attention would make it in every layer


def grow_tree(choices: Choices, parameters: int, device: str) -> ChoiceTree | None:
    """The tree of a task's choices; None where reading it would take longer than the calls it saves.

    Args:
        choices: of the task, forced tokens read as the model was trained.
        device: `cpu` or `cuda`.
    """
    most = min(MOST_TOKENS, WORTH.get(device, 0) / (2 * parameters))
    states, parents, chunks = [choices.first], [LEAF], [np.zeros(0, np.int64)]
    links: list[tuple[int, int, int]] = []
    size = 0
    for node, column, following in _edges(choices, states):
        if following != choices.end:
            links.append((node, column, len(states)))
            chunks.append(choices.chunk(states[node], column))
            states.append(following)
            parents.append(node)
            size += len(chunks[-1])
            if size > most:
                return None
    child_KR = np.full((len(states), choices.allowed_SW.shape[1]), LEAF)
    for node, column, child in links:
        child_KR[node, column] = child
    return _laid_out(np.array(states), child_KR, parents, chunks)


def _edges(choices: Choices, states: list[int]) -> Iterator[tuple[int, int, int]]:
    """Node, column and the state it leads to, of every node; `states` grows on the way."""
    if choices.first == choices.end:
        return
    for node, state in enumerate(states):
        for column in map(int, np.flatnonzero(choices.allowed_SW[state])):
            yield node, column, choices.step(state, column)


def _laid_out(
    states: NDArray[np.int64], child_KR: NDArray[np.int64], parents: list[int], chunks: list[NDArray[np.int64]]
) -> ChoiceTree:
    """The nodes' tokens one node after another; a parent is always before its children."""
    tokens = np.concatenate(chunks)
    visible_NN, places, last = np.eye(len(tokens), dtype=bool), np.zeros(len(tokens), np.int64), [-1]
    for parent, chunk in zip(parents[1:], chunks[1:], strict=True):
        before = last[parent]
        start = sum(map(len, chunks[: len(last)]))
        for i in range(start, start + len(chunk)):
            if before >= 0:
                visible_NN[i] |= visible_NN[before]
                places[i] = places[before] + 1
            before = i
        last.append(before)
    return ChoiceTree(states, child_KR, np.array(last), tokens, places, visible_NN)
