"""What a chunk of tokens attends to: itself, what was read before it, and how far each layer looks back.

Shape suffixes as in `student.model.model`.
"""

from __future__ import annotations

from copy import copy
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from student.model.shape import Shape

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values, each [B, G, T, K]


class Memory(Protocol):
    """What a chunk can look at beside itself."""

    def update(self, layer: int, positions_BT: torch.Tensor, chunk: Pair) -> Pair:
        """Takes a layer's keys and values of a chunk; returns all that its queries may look at."""


class Opening:
    """Collects the opening's keys and values, [1, G, P, K] each, as the opening is read."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def update(self, layer: int, positions_BT: torch.Tensor, chunk: Pair) -> Pair:
        """See `Memory`."""
        self.pairs.append(chunk)
        return chunk


class PrefixCache:
    """Puts every row of a chunk behind the opening."""

    def __init__(self, opening: Opening) -> None:
        self._pairs = opening.pairs

    def update(self, layer: int, positions_BT: torch.Tensor, chunk: Pair) -> Pair:
        """See `Memory`."""
        rows = (len(chunk[0]), -1, -1, -1)
        keys, values = (torch.cat([before.expand(rows), new], 2) for before, new in zip(self._pairs[layer], chunk, strict=True))
        return keys, values


class KeyValueCache:
    """Keys and values of what has been read, by slot: each row has its own length.

    A chunk is padded to its longest row. What its padding writes lies behind the row's length, where no query looks
    until the next chunk has written over it.

    Args:
        slots: the tokens a row can hold after the opening, padding of its last chunk included.
    """

    def __init__(self, shape: Shape, rows: int, slots: int, like: torch.Tensor, opening: Opening | None = None) -> None:
        before = len(shape.opening)
        size = (shape.layers, rows, shape.groups, before + slots, shape.per_head)
        self.keys_LBGCK, self.values_LBGCK = like.new_zeros(size), like.new_zeros(size)
        for layer, (keys, values) in enumerate(opening.pairs if opening else []):
            self.keys_LBGCK[layer, :, :, :before], self.values_LBGCK[layer, :, :, :before] = keys, values
        self.lengths_B = torch.full((rows,), before, dtype=torch.int64, device=like.device)
        self.filled = before  # slots written so far, in any row
        self.even = True  # whether all rows are equally long

    def positions(self, length: int) -> torch.Tensor:
        """Where a chunk goes: [B, T], or [1, T] where that is the same for all rows. It is then counted as read."""
        steps = torch.arange(length, device=self.lengths_B.device)
        positions = self.filled + steps[None] if self.even else self.lengths_B[:, None] + steps
        self.filled = min(self.filled + length, self.keys_LBGCK.shape[3])
        return positions

    def read(self, lengths_B: torch.Tensor) -> None:
        """Counts what was read of a chunk."""
        self.lengths_B, self.even = self.lengths_B + lengths_B, False

    def update(self, layer: int, positions_BT: torch.Tensor, chunk: Pair) -> Pair:
        """See `Memory`."""
        keys, values = (memory[layer, :, :, : self.filled] for memory in (self.keys_LBGCK, self.values_LBGCK))
        if self.even:
            start = self.filled - positions_BT.shape[1]
            keys[:, :, start:], values[:, :, start:] = chunk
            return keys, values
        at = positions_BT[:, None, :, None].expand_as(chunk[0])
        return keys.scatter_(2, at, chunk[0]), values.scatter_(2, at, chunk[1])

    def select(self, rows: NDArray[np.int64]) -> KeyValueCache:
        """A copy of some rows; a row may be taken twice."""
        other = copy(self)
        at = torch.as_tensor(rows, device=self.lengths_B.device)
        other.keys_LBGCK, other.values_LBGCK = self.keys_LBGCK[:, at], self.values_LBGCK[:, at]
        other.lengths_B = self.lengths_B[at]
        return other


class AttentionMask:
    """What a chunk attends to, by the window of a layer.

    Args:
        positions_BT: of its tokens; B may be 1 for all rows alike.
        keys: C, how many keys there are, those of the memory included.
    """

    def __init__(self, positions_BT: torch.Tensor, keys: int, windows: set[int | None], memory: Memory | None = None) -> None:
        self.positions_BT, self.memory = positions_BT, memory
        alone = keys == positions_BT.shape[1] and len(positions_BT) == 1
        self.masks = {w: None if alone and (w is None or keys <= w) else _mask(positions_BT, keys, w) for w in windows}

    def extend(self, layer: int, chunk: Pair) -> Pair:
        """The chunk's keys and values with those of the memory."""
        return chunk if self.memory is None else self.memory.update(layer, self.positions_BT, chunk)


def _mask(positions_BT: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """Which keys each query may look at: bool [B or 1, 1, T, C]."""
    back = positions_BT[:, None, :, None] - torch.arange(keys, device=positions_BT.device)
    return back >= 0 if window is None else (back >= 0) & (back < window)
