"""The student: a small decoder-only transformer that reads the teacher's tokens and writes watched tokens only.

Plain PyTorch: pre-norm blocks, RMSNorm, rotary positions, GELU, no biases, input and output tables apart.

Shape suffixes: B batch, T sequence, D width, H heads, K head width, V input vocabulary, W watched tokens, C cache slots,
L layers, M positions to predict at, R rows of the embedding.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Everything that sizes a student, and what it reads.

    Attributes:
        input_vocabulary: V, ids of the teacher's tokenizer.
        embeddings: R, rows of the embedding: those of the ids the corpus uses, and one for all others.
        output_vocabulary: W, watched tokens, and one more with the tail.
        context: tokens the student reads at most.
        layers, width, heads, mlp, sequence, dropout: see `StudentConfig`.
    """

    input_vocabulary: int
    embeddings: int
    output_vocabulary: int
    context: int
    layers: int
    width: int
    heads: int
    mlp: int
    sequence: str = "full"
    dropout: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Places = EllipsisType | tuple[torch.Tensor, torch.Tensor]  # of [B, T]: all, or rows and columns


class KeyValueCache:
    """Keys and values of what has been read, by slot: each row has its own length.

    A chunk is padded to its longest row. What its padding writes lies behind the row's length, where no query looks
    until the next chunk has written over it.
    """

    def __init__(self, shape: Shape, rows: int, slots: int, like: torch.Tensor) -> None:
        size = (shape.layers, rows, shape.heads, slots, shape.width // shape.heads)
        self.keys_LBHCK, self.values_LBHCK = like.new_zeros(size), like.new_zeros(size)
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=like.device)

    @property
    def slots(self) -> int:
        """C, the tokens a row can hold, padding of its last chunk included."""
        return self.keys_LBHCK.shape[3]

    def update(
        self, layer: int, positions_BT: torch.Tensor, keys_BHTK: torch.Tensor, values_BHTK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a chunk's keys and values at its positions; returns all of the layer's."""
        at = positions_BT[:, None, :, None].expand_as(keys_BHTK)
        keys, values = self.keys_LBHCK[layer], self.values_LBHCK[layer]
        return keys.scatter_(2, at, keys_BHTK), values.scatter_(2, at, values_BHTK)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions (Su et al., "RoFormer", 2021)."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self._layer, self._heads = layer, shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BTD: torch.Tensor, rotary: torch.Tensor, reach: Reach) -> torch.Tensor:
        """Mixes positions; `reach` says which."""
        batch, length, width = x_BTD.shape
        qkv = self.qkv(x_BTD).view(batch, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        if x_BTD.device.type == "cpu":
            qkv = qkv.float()  # CPUs are slow at rotations and attention in bf16
        queries, keys, values = rotate(qkv[0], rotary), rotate(qkv[1], rotary), qkv[2]
        if reach.cache is not None:
            keys, values = reach.cache.update(self._layer, reach.positions_BT, keys, values)
        with torch.autocast("cpu", enabled=False):
            mixed = F.scaled_dot_product_attention(queries, keys, values, reach.mask, is_causal=reach.mask is None)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


@dataclass(frozen=True)
class Reach:
    """What a chunk attends to: itself, causally, or itself and the cache, under a mask bool [B, 1, T, C]."""

    positions_BT: torch.Tensor
    cache: KeyValueCache | None = None
    mask: torch.Tensor | None = None


class Block(nn.Module):
    """One layer: attention, then a GELU feed-forward, each on a normalised residual."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape, layer)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.up = nn.Linear(shape.width, shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.width, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTD: torch.Tensor, rotary: torch.Tensor, reach: Reach, at: Places = ...) -> torch.Tensor:
        """One layer's residual stream to the next's; `at` picks the places where it goes on."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, reach))
        x = x_BTD[at]
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


class Student(nn.Module):
    """Token ids in, logits over the watched set out.

    A corpus uses few of the teacher's ids, so the embedding has rows for those alone: its memory, its optimizer's and its
    share of an all-reduce are theirs. All other ids share row 0.

    Args:
        shape: of the student.
        rows_V: int32, the row of each id; None, where weights are loaded next, leaves all at 0.
    """

    rotations: torch.Tensor
    rows: torch.Tensor

    def __init__(self, shape: Shape, rows_V: NDArray[np.int32] | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.bf16 = False  # of matrix products in whole sequences; DeepSpeed would switch off an autocast around it
        rows = torch.zeros(shape.input_vocabulary, dtype=torch.int32) if rows_V is None else torch.tensor(rows_V)
        self.register_buffer("rows", rows)
        self.embedding = nn.Embedding(shape.embeddings, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.output_vocabulary, bias=False)
        with torch.device("cpu"):  # also where the weights are yet to come
            angles = rotations(shape.context, shape.width // shape.heads)
        self.register_buffer("rotations", angles, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal 0.02, and less for what is added to the residual stream in every layer."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.shape.layers) if residual else 0.02)

    def forward(self, tokens_BT: torch.Tensor, predict_M: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of whole sequences, padded on the right (causality hides the padding).

        Args:
            tokens_BT: int64 ids.
            predict_M: int64 positions of the flattened [B × T] to predict at; None for all.

        Returns:
            [M, W], or [B, T, W] without `predict_M`.
        """
        length = tokens_BT.shape[1]
        positions = torch.arange(length, device=tokens_BT.device)[None]
        at: Places = ... if predict_M is None else (predict_M // length, predict_M % length)
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=self.bf16):
            return self._logits(tokens_BT, Reach(positions), at)

    def read(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Reads one more chunk of each row into the cache.

        Args:
            tokens_BT: int64 ids, padded on the right.
            lengths_B: int64, tokens of each row's chunk; 0 leaves a row as it is.
            cache: what was read before; it grows.

        Returns:
            [B, W], logits after each row's last token; of no meaning for rows with an empty chunk.
        """
        steps = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        positions_BT = cache.lengths_B[:, None] + steps
        slots = torch.arange(cache.slots, device=tokens_BT.device)
        mask_B1TC = slots <= positions_BT[:, None, :, None]
        rows = torch.arange(len(tokens_BT), device=tokens_BT.device)
        logits_BW = self._logits(tokens_BT, Reach(positions_BT, cache, mask_B1TC), (rows, (lengths_B - 1).clamp_min(0)))
        cache.lengths_B += lengths_B
        return logits_BW

    def _logits(self, tokens_BT: torch.Tensor, reach: Reach, at: Places) -> torch.Tensor:
        """Logits at some places: the last layer's keys and values are wanted of all tokens, its feed-forward is not."""
        # Padding may lie behind the context; what is computed there is never read.
        rotary = self.rotations[reach.positions_BT.clamp_max(self.shape.context - 1)][:, None]
        x_BTD = self.dropout(self.embedding(self.rows[tokens_BT]))
        *before, last = self.blocks
        for block in before:
            x_BTD = block(x_BTD, rotary, reach)
        return self.head(self.norm(last(x_BTD, rotary, reach, at)))

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the input embedding and of all the rest."""
        embedding = self.embedding.weight.numel()
        return {"embedding": embedding, "rest": sum(p.numel() for p in self.parameters()) - embedding}


def embedding_rows(counts_V: NDArray[np.int64], always: NDArray[np.int32]) -> NDArray[np.int32]:
    """The embedding's row of each id: int32 [V], with rows from 1 for ids seen twice, and 0 for all others.

    Ids seen once share their row with the ids never seen: what they have in common is all there is to learn of those, and
    it is trained.

    Args:
        counts_V: how often the training comments hold each id.
        always: ids with a row of their own in any case, those of answers.
    """
    known_V = counts_V >= 2
    known_V[always] = True
    return np.where(known_V, np.cumsum(known_V), 0).astype(np.int32)


def rotations(length: int, head_width: int) -> torch.Tensor:
    """Cosines and sines of every position's rotation: float32 [length, 2, head_width / 2]."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_width, 2) / head_width)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], 1)


def rotate(x_BHTK: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotates the two halves of each head by its position: rotary is [B or 1, 1, T, 2, K / 2]."""
    cosine, sine = rotary.unbind(-2)
    left, right = x_BHTK.chunk(2, -1)
    return torch.cat([left * cosine - right * sine, left * sine + right * cosine], -1)
