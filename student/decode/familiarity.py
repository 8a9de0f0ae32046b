"""How like those that a student was trained on a text is: by how sure the student is of it, and by how much of it is new.

The student alone cannot tell: one that knows few values is as sure of any text as of its own (docs/log.md). So the n-grams of
training texts are kept as a set of bits, with no text in it.

Shape suffixes: V held-out texts, N texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.errors import UserError
from student.model.checkpoint import load_tensors, save_tensors
from student.model.reader import ngram_rows

ROWS = 1 << 20  # of hashed n-grams: 10,000 texts of a dozen words fill a fifth of them
TRAINED_ON = 10_000  # training texts whose n-grams are known, at most
PIECE = 4096  # texts whose n-grams are in memory at once
FILE = "familiarity.safetensors"  # beside a student

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Familiarity:
    """What a text is held against.

    Attributes:
        known: bool [`ROWS`], the rows that n-grams of training texts have.
        confidence: float64 [V], in the whole answers to held-out texts.
        unknown: float64 [V], the share of their n-grams that no training text has.
    """

    known: NDArray[np.bool_]
    confidence: Numbers
    unknown: Numbers

    @staticmethod
    def fit(trained_on: list[str], held_out: Iterable[str], confidence: Numbers) -> Familiarity:
        """By some of the training texts, and held-out ones with the confidence in their answers: float64 [V]."""
        known = np.zeros(ROWS, np.bool_)
        known[np.concatenate(ngram_rows(trained_on, ROWS))] = True
        return Familiarity(known, confidence, _unknown(known, held_out))

    def of(self, texts: Iterable[str], confidence: Numbers) -> Numbers:
        """The share of held-out texts that are no more familiar than each text: float64 [N], small for what is new.

        Of a text's confidence and of the share of its n-grams that are unknown, the product of the two p-values among the
        held-out texts (Fisher, "Statistical Methods for Research Workers", 1925), and the p-value of that product.

        Args:
            confidence: float64 [N], in the whole answers.
        """
        return _rank(self._held_out, self._product(confidence, _unknown(self.known, texts)))

    @cached_property
    def _held_out(self) -> Numbers:
        return np.sort(self._product(self.confidence, self.unknown))

    @cached_property
    def _sorted(self) -> tuple[Numbers, Numbers]:
        return np.sort(self.confidence), np.sort(-self.unknown)

    def _product(self, confidence: Numbers, unknown: Numbers) -> Numbers:
        return _rank(self._sorted[0], confidence) * _rank(self._sorted[1], -unknown)

    def save(self, folder: str) -> None:
        """Beside a student, for `load`."""
        parts = {"seen": np.packbits(self.known), "confidence": self.confidence, "unknown": self.unknown}
        save_tensors(storage.join(folder, FILE), {name: torch.from_numpy(part) for name, part in parts.items()})

    @staticmethod
    def load(folder: str) -> Familiarity:
        """A student's.

        Raises:
            UserError: it was not evaluated, or the file is damaged.
        """
        path = storage.join(folder, FILE)
        if not storage.exists(path):
            raise UserError(f"nothing in {folder} says which texts the student is familiar with: run `retort evaluate` first")
        parts = {name: tensor.numpy() for name, tensor in load_tensors(path).items()}
        shapes = {name: (str(part.dtype), part.shape) for name, part in parts.items()}
        held_out = parts["confidence"].shape if "confidence" in parts else ()
        if len(held_out) != 1 or shapes != {
            "seen": ("uint8", (ROWS // 8,)),
            "confidence": ("float64", held_out),
            "unknown": ("float64", held_out),
        }:
            raise UserError(f"{path} is damaged: run `retort evaluate` again")
        return Familiarity(np.unpackbits(parts.pop("seen")).astype(np.bool_), **parts)


def _unknown(known: NDArray[np.bool_], texts: Iterable[str]) -> Numbers:
    """The share of each text's n-grams that no training text has."""
    stream = iter(texts)
    pieces = iter(lambda: list(islice(stream, PIECE)), [])
    return np.fromiter((1 - known[rows].mean() for piece in pieces for rows in ngram_rows(piece, ROWS)), np.float64)


def _rank(of_held_out: Numbers, values: Numbers) -> Numbers:
    """The share of held-out texts, sorted, whose value is as small as each; the text itself counts as one of them."""
    return (1 + np.searchsorted(of_held_out, values, side="right")) / (1 + len(of_held_out))
