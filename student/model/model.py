"""The student: a small decoder-only transformer that reads the teacher's tokens and writes watched tokens only.

Plain PyTorch: pre-norm blocks, RMSNorm, rotary positions, GELU, no biases, input and output tables apart. In the family
`gemma3` they are Gemma 3's (Gemma Team, "Gemma 3 Technical Report", 2025), so that a student can be cut from such a model:
the feed-forward is gated, what a block adds is normalised too, and so are queries and keys.

Shape suffixes: B batch, T sequence, D width, H heads, G key/value heads, K head width, V input vocabulary, W watched tokens,
C keys that a chunk may look at, M positions to predict at, P tokens of the opening, R rows of the embedding.
"""

from __future__ import annotations

import math
from types import EllipsisType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from student.model.cache import AttentionMask, KeyValueCache, Memory, Opening, PrefixCache
from student.model.reader import make_reader, placed
from student.model.shape import PLAIN, Layer, Shape

Text = tuple[torch.Tensor, torch.Tensor]  # ids of texts for a reader, int64 [B, L], and their lengths [B]
Places = EllipsisType | tuple[torch.Tensor, torch.Tensor]  # of [B, T]: all, or rows and columns


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., "GQA", 2023) with rotary positions (Su et al., "RoFormer", 2021)."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self._layer, self._kind = layer, shape.each_layer[layer]
        self._parts = (shape.heads, shape.groups, shape.groups)
        self._head_width, self._scale = shape.per_head, shape.score_scale
        self.qkv = nn.Linear(shape.width, sum(self._parts) * shape.per_head, bias=False)
        self.out = nn.Linear(shape.heads * shape.per_head, shape.width, bias=False)
        if shape.is_gemma:
            self.query_norm = nn.RMSNorm(shape.per_head, shape.head_epsilon)
            self.key_norm = nn.RMSNorm(shape.per_head, shape.head_epsilon)

    def forward(self, x_BTD: torch.Tensor, rotary: dict[Layer, torch.Tensor], reach: AttentionMask) -> torch.Tensor:
        """Mixes positions; `reach` says which."""
        batch, length, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(batch, length, -1, self._head_width).transpose(1, 2)
        if x_BTD.device.type == "cpu":
            qkv = qkv.float()  # CPUs are slow at rotations and attention in bf16
        with torch.autocast("cpu", enabled=False):
            heads = self._parts[0]
            turned, values = qkv[:, : sum(self._parts[:2])], qkv[:, sum(self._parts[:2]) :]
            if hasattr(self, "query_norm"):
                turned = torch.cat([self.query_norm(turned[:, :heads]), self.key_norm(turned[:, heads:])], 1)
            turned = rotate(turned, rotary[self._kind]).to(values.dtype)  # both in one: a short call is all overhead
            queries, keys = turned[:, :heads], turned[:, heads:]
            keys, values = reach.extend(self._layer, (keys, values))
            mixed = self._mix(queries, keys, values, reach.masks[self._kind.window])
        if self.out.weight.dtype != torch.float32:  # in training it is, and autocast sees to it
            mixed = mixed.to(self.out.weight.dtype)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))

    def _mix(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention, [B, H, T, K]; without a mask each position looks at itself and back."""
        shared = self._parts[0] // self._parts[1]
        if shared > 1 and queries.is_cuda and (mask is not None or queries.dtype == torch.float32):
            # CUDA's one fast kernel for masks and for float32 wants as many keys as queries: torch 2.13 falls to a slow one
            keys, values = (part.repeat_interleave(shared, 1) for part in (keys, values))
            shared = 1
        grouped = {"enable_gqa": True} if shared > 1 else {}
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, scale=self._scale, **grouped)


class Block(nn.Module):
    """One layer: attention, then a feed-forward, each on a normalised residual."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self._gated = shape.is_gemma
        self.attention_norm = nn.RMSNorm(shape.width, shape.epsilon)
        self.attention = Attention(shape, layer)
        self.mlp_norm = nn.RMSNorm(shape.width, shape.epsilon)
        self.up = nn.Linear(shape.width, shape.mlp * (1 + self._gated), bias=False)  # gated: gates first, then values
        self.down = nn.Linear(shape.mlp, shape.width, bias=False)
        self.dropout = nn.Dropout(shape.dropout)
        if shape.is_gemma:
            self.attention_out_norm = nn.RMSNorm(shape.width, shape.epsilon)
            self.mlp_out_norm = nn.RMSNorm(shape.width, shape.epsilon)

    def forward(
        self, x_BTD: torch.Tensor, rotary: dict[Layer, torch.Tensor], reach: AttentionMask, at: Places = ...
    ) -> torch.Tensor:
        """One layer's residual stream to the next's; `at` picks the places where it goes on."""
        mixed_BTD = self.attention(self.attention_norm(x_BTD), rotary, reach)
        x = (x_BTD + self.dropout(self.attention_out_norm(mixed_BTD) if self._gated else mixed_BTD))[at]
        fed = self.down(self._activate(self.up(self.mlp_norm(x))))
        return x + self.dropout(self.mlp_out_norm(fed) if self._gated else fed)

    def _activate(self, up: torch.Tensor) -> torch.Tensor:
        if not self._gated:
            return F.gelu(up)
        gates, values = up.chunk(2, -1)
        return F.gelu(gates, approximate="tanh") * values


class Student(nn.Module):
    """Token ids in, logits over the watched set out; with a reader, texts in its ids beside them.

    A corpus uses few of the teacher's ids, so the embedding has rows for those alone: its memory, its optimizer's and its
    share of an all-reduce are theirs. All other ids share row 0.

    Args:
        rows_V: int32, the row of each id; None, where weights are loaded next, leaves all at 0.
    """

    rotations: torch.Tensor
    rows: torch.Tensor
    opening_1P: torch.Tensor

    def __init__(self, shape: Shape, rows_V: NDArray[np.int32] | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.bf16 = False  # of matrix products in whole sequences; DeepSpeed would switch off an autocast around it
        rows = torch.zeros(shape.input_vocabulary, dtype=torch.int32) if rows_V is None else torch.tensor(rows_V)
        self.register_buffer("rows", rows)
        to_come = torch.empty(0).is_meta  # and the first random number there is would take a second of imports
        table = torch.empty(shape.embeddings, shape.width) if to_come else None
        self.embedding = nn.Embedding(shape.embeddings, shape.width, _weight=table)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.reader = make_reader(shape.reader, shape.width) if shape.reader else None
        self.norm = nn.RMSNorm(shape.width, shape.epsilon)
        self.head = nn.Linear(shape.width, shape.output_vocabulary, bias=False)
        self._kinds = list(dict.fromkeys(shape.each_layer))
        with torch.device("cpu"):  # also where the weights are yet to come
            angles = torch.stack([rotations(shape.context, shape.per_head, kind) for kind in self._kinds])
            opening = torch.tensor([shape.opening], dtype=torch.int64)
        self.register_buffer("rotations", angles, persistent=False)
        self.register_buffer("opening_1P", opening, persistent=False)
        if not to_come:
            self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal 0.02, and less for what is added to the residual stream in every layer."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.startswith("reader.model."):
                residual = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.shape.layers) if residual else 0.02)

    def forward(self, tokens_BT: torch.Tensor, predict_M: torch.Tensor | None = None, text: Text | None = None) -> torch.Tensor:
        """Logits of whole sequences, padded on the right (causality hides the padding).

        Args:
            tokens_BT: int64 ids.
            predict_M: int64 positions of the flattened [B × T] to predict at; None for all.
            text: for a reader, whose vectors take the first places of each row.

        Returns:
            [M, W], or [B, T, W] without `predict_M`.
        """
        length, before = tokens_BT.shape[1], self.opening_1P.shape[1]
        at: Places = ... if predict_M is None else (predict_M // length, predict_M % length)
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=self.bf16):
            opening = self.read_opening()
            positions_1T = torch.arange(before, before + length, device=tokens_BT.device)[None]
            reach = self._reach(positions_1T, before + length, PrefixCache(opening) if opening else None)
            return self._logits(tokens_BT, reach, at, text)

    def read_opening(self) -> Opening | None:
        """What every row looks back at, computed once for all of them; None without an opening."""
        if not self.shape.opening:
            return None
        opening, length = Opening(), self.opening_1P.shape[1]
        positions_1P = torch.arange(length, device=self.opening_1P.device)[None]
        self._blocks(self.opening_1P, self._reach(positions_1P, length, opening), ...)
        return opening

    def cache(self, rows: int, slots: int, opening: Opening | None) -> KeyValueCache:
        """An empty cache, of the kind that attention computes in.

        Args:
            slots: see `KeyValueCache`.
            opening: as `read_opening` gives it.
        """
        like = self.rotations if self.rotations.device.type == "cpu" else self.head.weight
        return KeyValueCache(self.shape, rows, slots, like, opening)

    def halved(self) -> Student:
        """Itself with weights in bf16: half the memory, and half the time where that is what a call waits for."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return self

    def read(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, cache: KeyValueCache, text: Text | None = None
    ) -> torch.Tensor:
        """Reads one more chunk of each row into the cache.

        Args:
            tokens_BT: int64 ids, padded on the right.
            lengths_B: int64, tokens of each row's chunk; 0 leaves a row as it is.
            cache: what was read before; it grows.
            text: as in `forward`, with the first chunk.

        Returns:
            [B, W], logits after each row's last token; of no meaning for rows with an empty chunk.
        """
        positions_BT = cache.positions(tokens_BT.shape[1])
        rows = torch.arange(len(tokens_BT), device=tokens_BT.device)
        reach = self._reach(positions_BT, cache.filled, cache)
        logits_BW = self._logits(tokens_BT, reach, (rows, (lengths_B - 1).clamp_min(0)), text)
        cache.read(lengths_B)
        return logits_BW

    def rest(self, x_BTD: torch.Tensor, first: int) -> torch.Tensor:
        """Logits [B, T, W] from a layer on.

        Args:
            first: the layer; the number of layers for the output head alone.
        """
        length = x_BTD.shape[1]
        reach = self._reach(torch.arange(length, device=x_BTD.device)[None], length, None)
        rotary = self._rotary(reach)
        for block in self.blocks[first:]:
            x_BTD = block(x_BTD, rotary, reach)
        return self.head(self.norm(x_BTD))

    def _reach(self, positions_BT: torch.Tensor, keys: int, memory: Memory | None) -> AttentionMask:
        return AttentionMask(positions_BT, keys, {kind.window for kind in self._kinds}, memory)

    def _rotary(self, reach: AttentionMask) -> dict[Layer, torch.Tensor]:
        """The rotations of a chunk, by kind of layer."""
        # Padding may lie behind the context; what is computed there is never read.
        positions_BT = reach.positions_BT.clamp_max(self.shape.context - 1)
        return {kind: angles[positions_BT][:, None] for kind, angles in zip(self._kinds, self.rotations, strict=True)}

    def _logits(self, tokens_BT: torch.Tensor, reach: AttentionMask, at: Places, text: Text | None = None) -> torch.Tensor:
        return self.head(self.norm(self._blocks(tokens_BT, reach, at, text)))

    def _blocks(self, tokens_BT: torch.Tensor, reach: AttentionMask, at: Places, text: Text | None = None) -> torch.Tensor:
        """The residual stream at some places: the last layer's keys and values are wanted of all, its feed-forward is not."""
        rotary = self._rotary(reach)
        x_BTD = self.embedding(self.rows[tokens_BT])
        if self.reader is not None and text is not None:
            x_BTD = placed(x_BTD, *self.reader(*text))
        x_BTD = self.dropout(x_BTD)
        *before, last = self.blocks
        for block in before:
            x_BTD = block(x_BTD, rotary, reach)
        return last(x_BTD, rotary, reach, at)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the tables that ids are looked up in, and of all the rest."""
        tables = (module for module in self.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
        embedding = sum(table.weight.numel() for table in tables)
        return {"embedding": embedding, "rest": sum(p.numel() for p in self.parameters()) - embedding}


def embedding_rows(counts_V: NDArray[np.int64], always: NDArray[np.int32], least: int = 2) -> NDArray[np.int32]:
    """The embedding's row of each id: int32 [V], with rows from 1 for ids seen twice, and 0 for all others.

    Ids seen once share their row with the ids never seen: what they have in common is all there is to learn of those, and
    it is trained.

    Args:
        always: ids with a row of their own in any case, those of answers.
        least: how often an id must be seen. Where rows are taken from a trained model, once is enough.
    """
    known_V = counts_V >= least
    known_V[always] = True
    return np.where(known_V, np.cumsum(known_V), 0).astype(np.int32)


def rotations(length: int, head_width: int, kind: Layer = PLAIN) -> torch.Tensor:
    """Cosines and sines of every position's rotation in a layer: float32 [length, 2, head_width / 2]."""
    frequencies = kind.base ** -(torch.arange(0, head_width, 2) / head_width) / kind.stretch
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], 1)


def rotate(x_BHTK: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotates the two halves of each head by its position: rotary is [B or 1, 1, T, 2, K / 2]."""
    cosine, sine = rotary.unbind(-2)
    left, right = x_BHTK.chunk(2, -1)
    return torch.cat([left * cosine - right * sine, left * sine + right * cosine], -1)
