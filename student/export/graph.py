"""Greedy decoding under the automaton as one module without branches, to be traced into a graph.

Every choice is unrolled. Rows whose answer is whole go on through steps of no meaning, as a graph cannot leave them out.

Shape suffixes: B batch, T tokens, M choices of the longest way, S states, K states with a choice and the end, R required
tokens, X tokens of the longest forced run.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from student.decode.choices import NONE, Choices
from student.model.cache import KeyValueCache, Pair
from student.model.model import Student
from student.model.shape import Shape


class GrowingCache(KeyValueCache):
    """A cache that writes nothing in place: each chunk makes longer keys and values."""

    def __init__(self, shape: Shape, tokens_BT: torch.Tensor, opening: list[Pair]) -> None:
        rows, self.filled = len(tokens_BT), len(shape.opening)
        self._pairs = [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in opening]
        self.lengths_B = torch.full_like(tokens_BT[:, 0], self.filled)

    def positions(self, length: int) -> torch.Tensor:
        """See `KeyValueCache`: here always [B, T], as what is alike would be traced apart for short chunks and long ones."""
        self.filled += length
        return self.lengths_B[:, None] + torch.arange(length)

    def read(self, lengths_B: torch.Tensor) -> None:
        """See `KeyValueCache`."""
        self.lengths_B = self.lengths_B + lengths_B

    def update(self, layer: int, positions_BT: torch.Tensor, chunk: Pair) -> Pair:
        """See `student.model.cache.Memory`."""
        if layer == len(self._pairs):  # the first chunk, and no opening before it
            self._pairs.append(chunk)
            return chunk
        at = positions_BT[:, None, :, None].expand_as(chunk[0])
        before_keys, before_values = self._pairs[layer]
        keys, values = (
            torch.cat([before, torch.zeros_like(new)], 2).scatter(2, at, new)
            for before, new in ((before_keys, chunk[0]), (before_values, chunk[1]))
        )
        self._pairs[layer] = (keys, values)
        return keys, values


class Tables(nn.Module):
    """The automaton's choices as tensors. The first row is the first choice's, the last row the end's, which allows all.

    Args:
        choices: of the task, forced tokens read as the model was trained.
        temperatures_S: float32, what the logits at each state are divided by.
    """

    allowed_KR: torch.Tensor
    temperatures_K: torch.Tensor
    following_KR: torch.Tensor
    targets_KR: torch.Tensor
    before_KR: torch.Tensor
    watched_R: torch.Tensor
    opening_1X: torch.Tensor
    chunks_SX: torch.Tensor
    lengths_S: torch.Tensor

    def __init__(self, choices: Choices, required: int, temperatures_S: NDArray[np.float32]) -> None:
        super().__init__()
        states, columns = choice_states(choices), np.arange(required)
        allowed_KR = choices.allowed_SW[states, :required]
        targets_KR = np.where(allowed_KR, choices.targets(states[:, None], columns), choices.end)
        place_S = np.zeros(choices.end + 1, np.int64)
        place_S[states] = np.arange(len(states))
        allowed_KR[-1] = True
        tables = {
            "allowed_KR": allowed_KR,
            "temperatures_K": temperatures_S[states],
            "following_KR": place_S[choices.after(targets_KR)],
            "targets_KR": targets_KR,
            "before_KR": answers_before(choices, states)[:, :required],
            "watched_R": choices.watched[:required],
            "opening_1X": choices.opening[None],
            "chunks_SX": choices.chunks_SX,
            "lengths_S": choices.lengths_S,
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.as_tensor(table))


def choice_states(choices: Choices) -> NDArray[np.int64]:
    """The states with a choice, lowest and so first choice first, and the end: [K]."""
    return np.append(np.flatnonzero(choices.allowed_SW.sum(1) > 1), choices.end)


def answers_before(choices: Choices, states: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many answers take a lower column than this at a choice: [K, W]. Summed up along an answer, they number it.

    Args:
        choices: of a task whose answers can be counted in 64 bits.
        states: as `choice_states` gives them.
    """
    ways_S = np.zeros(choices.end + 1, np.int64)
    ways_S[choices.end] = 1
    before_KW = np.zeros((len(states), choices.allowed_SW.shape[1]), np.int64)
    for row, state in reversed(list(enumerate(states[:-1]))):  # steps lead to higher states
        columns = np.flatnonzero(choices.allowed_SW[state])
        ways = ways_S[choices.after(choices.targets(np.full(len(columns), state), columns))].cumsum()
        before_KW[row, columns[1:]] = ways[:-1]
        ways_S[state] = ways[-1]
    return before_KW


class Greedy(nn.Module):
    """Comments in, the likeliest allowed token of every choice out.

    Args:
        model: in evaluation mode, on the CPU.
        choices: of its task, forced tokens read as the model was trained.
        numbered: whether to number the answers too, see `answers_before`.
    """

    def __init__(self, model: Student, choices: Choices, tables: Tables, numbered: bool) -> None:
        super().__init__()
        self.model, self.tables = model, tables
        self._most, self._end, self._numbered = choices.most, len(tables.allowed_KR) - 1, numbered
        with torch.no_grad():
            opening = model.read_opening()
        self._opening: list[Pair] = opening.pairs if opening else []

    def forward(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Decodes.

        Args:
            tokens_BT: int64 ids of comment and separator, or a reader's ids of the text, padded on the right.
            lengths_B: int64, ids of each row.

        Returns:
            Columns of the watched set int64 [B, M], `NONE` behind the last; probabilities float32 [B, M, R], 0 behind the
            last; and the answers' numbers int64 [B], if asked for.
        """
        tables = self.tables
        cache = GrowingCache(self.model.shape, tokens_BT, self._opening)
        text = (tokens_BT, lengths_B) if self.model.shape.reader else None
        chunk_BT, chunk_lengths_B = self._opened(*self._places(tokens_BT, lengths_B))
        state_B = number_B = torch.zeros_like(lengths_B)
        columns, probabilities = [], []
        for _ in range(self._most):
            going_B = state_B != self._end
            probability_BR = self._probability(self.model.read(chunk_BT, chunk_lengths_B, cache, text), state_B)
            text = None
            column_B = probability_BR.argmax(-1)
            columns.append(column_B.masked_fill(~going_B, NONE))
            probabilities.append(probability_BR.masked_fill(~going_B[:, None], 0))
            number_B = number_B + tables.before_KR[state_B, column_B]
            target_B = tables.targets_KR[state_B, column_B]
            chunk_BT = torch.cat([tables.watched_R[column_B, None], tables.chunks_SX[target_B]], 1)
            chunk_lengths_B = 1 + tables.lengths_S[target_B]
            state_B = tables.following_KR[state_B, column_B]
        if not columns:  # a task of one answer
            found = (tokens_BT[:, :0], tables.temperatures_K.new_zeros(len(tokens_BT), 0, len(tables.watched_R)))
        else:
            found = (torch.stack(columns, 1), torch.stack(probabilities, 1))
        return (*found, number_B) if self._numbered else found

    def _places(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The comments themselves, or places for the vectors that a reader makes of them."""
        reader = self.model.shape.reader
        if reader is None:
            return tokens_BT, lengths_B
        if reader.pools:
            return torch.zeros_like(tokens_BT[:, :1]), torch.ones_like(lengths_B)
        return torch.zeros_like(tokens_BT), lengths_B

    def _opened(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The comments with the forced tokens before the first choice right behind them."""
        opening_1X = self.tables.opening_1X
        forced = opening_1X.shape[1]
        if not forced:
            return tokens_BT, lengths_B
        places_BX = lengths_B[:, None] + torch.arange(forced)
        return F.pad(tokens_BT, (0, forced)).scatter(1, places_BX, opening_1X.expand(len(tokens_BT), -1)), lengths_B + forced

    def _probability(self, logits_BC: torch.Tensor, state_B: torch.Tensor) -> torch.Tensor:
        """Of every required token, over those allowed: float32 [B, R]."""
        tables = self.tables
        logits_BR = logits_BC[:, : len(tables.watched_R)].float() / tables.temperatures_K[state_B, None]
        return logits_BR.masked_fill(~tables.allowed_KR[state_B], -torch.inf).softmax(-1)
