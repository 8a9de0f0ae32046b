"""Readers: what turns a text into vectors of the student's width, where it does not read the teacher's tokens itself.

A reader has ids of its own for a text. `Pretrained` is a model of `transformers` with its tokenizer; `Ngrams` adds up
embeddings of hashed words and characters. What they give stands where a comment's tokens stood.

Shape suffixes: B batch, L ids, N vectors of a text, D width, E width of a pretrained model.
"""

from __future__ import annotations

import hashlib
import unicodedata
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from student.model.shape import ReaderShape

Ids = list[NDArray[np.int32]]  # of each text

SHORTEST, LONGEST = 2, 5  # characters of an n-gram
STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2^64: 2^64 over the golden ratio
INVERSE = np.uint64(pow(int(STEP), -1, 1 << 64))
SPACE = np.uint64(ord(" "))


class Ngrams(nn.Module):
    """The sum of the embeddings of a text's words and pairs of words, over √count, and that of runs of 2 to 5 characters.

    They are hashed into as many rows as the table has (Weinberger et al., "Feature Hashing", 2009), so there is no vocabulary.
    Each sort has its own count, as runs are many: two points better than one for both (docs/log.md).
    """

    def __init__(self, shape: ReaderShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.EmbeddingBag(shape.vocabulary, width, mode="sum")

    def encode(self, texts: list[str]) -> Ids:
        """The rows of each text's n-grams."""
        return ngram_rows(texts, self.shape.vocabulary)

    @property
    def identity(self) -> str:
        """What its ids depend on."""
        return f"ngrams-3-{self.shape.vocabulary}"  # the third way to make them: ids unpacked by another are not taken

    def forward(self, ids_BL: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One vector a text: [B, 1, D], and how many there are: [B]."""
        mask_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
        runs_BL = ids_BL >= self.shape.vocabulary // 2
        runs_B1 = (mask_BL & runs_BL).sum(1, keepdim=True)
        counts_BL = torch.where(runs_BL, runs_B1, lengths_B[:, None] - runs_B1)
        weights_BL = mask_BL / counts_BL.clamp_min(1).sqrt()
        if torch.compiler.is_exporting():  # a graph knows no bags
            vectors_BD = (self.embedding.weight[ids_BL] * weights_BL[..., None]).sum(1)
        else:
            starts_B = lengths_B.cumsum(0) - lengths_B
            vectors_BD = self.embedding(ids_BL[mask_BL], starts_B, per_sample_weights=weights_BL[mask_BL])
        return vectors_BD[:, None], torch.ones_like(lengths_B)


def ngram_rows(texts: list[str], rows: int) -> Ids:
    """Of each text, in lower case, the rows of its words and pairs of words, of the first half, and of runs of characters.

    A run may begin or end with a space, but has none inside: across words, runs are worse (docs/log.md).
    """
    plain = [f" {' '.join(text.casefold().split())} " for text in texts]
    codes = np.frombuffer("".join(plain).encode("utf-32-le"), np.uint32).astype(np.uint64)
    owner = np.repeat(np.arange(len(plain)), [len(text) for text in plain])
    half, sorts = rows // 2, (_words(codes, owner), _characters(codes, owner))
    found = [
        (_spread(hashes, half) + first, owners) for first, sort in zip((0, half), sorts, strict=True) for hashes, owners in sort
    ]
    all_rows, owners = (np.concatenate(part) for part in zip(*found, strict=True))
    sizes = np.bincount(owners, minlength=len(plain))
    return np.split(all_rows[np.argsort(owners, kind="stable")].astype(np.int32), np.cumsum(sizes)[:-1])


def _spread(hashes: NDArray[np.uint64], rows: int) -> NDArray[np.int64]:
    mixed = hashes ^ (hashes >> np.uint64(29))
    return ((mixed * STEP) >> np.uint64(32)).astype(np.int64) % rows


def _characters(codes: NDArray[np.uint64], owner: NDArray[np.int64]) -> list[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """Hashes of runs of characters, and the texts they are of."""
    found, hashes = [], np.zeros(len(codes), np.uint64)
    spaces = np.concatenate([[0], np.cumsum(codes == SPACE)])
    for size in range(1, min(LONGEST, len(codes)) + 1):
        ends = len(codes) - size + 1
        hashes = hashes[:ends] * STEP + codes[size - 1 :]
        if size >= SHORTEST:
            inside = spaces[size - 1 : size - 1 + ends] - spaces[1 : 1 + ends]
            within = (owner[:ends] == owner[size - 1 :]) & (inside == 0)
            found.append((hashes[within], owner[:ends][within]))
    return found


def _words(codes: NDArray[np.uint64], owner: NDArray[np.int64]) -> list[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """The same of words, and of pairs of them; what stands between two words, such as !!!, is a word of its own.

    A word's hash is Σ code · STEP^place, so differences of running sums give all of them at once.
    """
    found, places = np.unique(codes, return_inverse=True)
    sorts = np.array([0 if code == SPACE else 1 + _in_words(chr(code)) for code in found.tolist()])
    edges = np.flatnonzero(np.diff(sorts[places])) + 1
    inside = sorts[places[edges[:-1]]] > 0
    starts, ends = edges[:-1][inside], edges[1:][inside]
    powers = np.cumprod(np.full(len(codes), STEP))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers)])
    words = (sums[ends] - sums[starts]) * np.cumprod(np.full(len(codes), INVERSE))[starts] + np.uint64(1)
    pairs = owner[starts[:-1]] == owner[starts[1:]]
    both = words[:-1] * INVERSE + words[1:]
    return [(words, owner[starts]), (both[pairs], owner[starts[:-1]][pairs])]


def _in_words(character: str) -> bool:
    return character in "'’" or unicodedata.category(character)[0] in "LMN"  # letters, marks, numbers


class Pretrained(nn.Module):
    """A model of `transformers`, its states projected to the student's width, which the decoder attends to.

    One vector, the states' mean, did worse: by 2 points of whole answers from 4,000 comments (docs/log.md).
    """

    tokenizer: torch.Tensor

    def __init__(self, shape: ReaderShape, width: int) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        self.shape = shape
        config = AutoConfig.for_model(**(shape.config or {}))
        with torch.device("cpu"):  # also where the weights are yet to come: what a model computes at its start is no weight
            self.model: Any = AutoModel.from_config(config, dtype=torch.float32)
            self.model.pooler = None  # of no use here, and a weight without a gradient
        for module in self.model.modules():
            module._non_persistent_buffers_set.update(module._buffers)
        self.project = nn.Linear(config.hidden_size, width, bias=False)
        self.register_buffer("tokenizer", torch.zeros(shape.tokenizer, dtype=torch.uint8))

    @cached_property
    def _encoder(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer.cpu().numpy().tobytes().decode())
        tokenizer.encode_special_tokens = True  # the text of a control token is text: a comment is data
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.shape.context)
        return tokenizer

    @property
    def identity(self) -> str:
        """What its ids depend on."""
        return hashlib.sha256(self.tokenizer.cpu().numpy().tobytes() + str(self.shape.context).encode()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> Ids:
        """The model's own tokens of each text, those it begins and ends with among them."""
        return [np.array(found.ids, np.int32) for found in self._encoder.encode_batch(texts)]

    def forward(self, ids_BL: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [B, N, D] of texts, and how many there are of each: [B]."""
        mask_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
        states_BLE = self.model(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        return self.project(states_BLE), lengths_B


Reader = Ngrams | Pretrained


def make_reader(shape: ReaderShape, width: int) -> Reader:
    """A reader of some shape."""
    return Ngrams(shape, width) if shape.kind == "ngrams" else Pretrained(shape, width)


def placed(x_BTD: torch.Tensor, vectors_BND: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Vectors in the first places of each row, as many as there are of it."""
    count = vectors_BND.shape[1]
    taken_BN = torch.arange(count, device=counts_B.device) < counts_B[:, None]
    first = torch.where(taken_BN[..., None], vectors_BND.to(x_BTD.dtype), x_BTD[:, :count])
    return torch.cat([first, x_BTD[:, count:]], 1)


def side_by_side(ids: Ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of texts as int64 [B, L], padded with 0, and their lengths [B]."""
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
    padded[torch.arange(padded.shape[1]) < lengths[:, None]] = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    return padded, lengths
