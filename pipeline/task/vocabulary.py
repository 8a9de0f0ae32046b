"""The watched set W: the tokens whose logits are kept at every step, which are the student's whole output vocabulary."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.base import storage
from pipeline.base.config import Strict
from pipeline.base.errors import UserError
from pipeline.task.automaton import Automaton
from pipeline.task.tokenization import TextTokenizer


class _Row(Strict):
    id: int = Field(ge=0, lt=2**31)
    token: str


class _File(Strict):
    """The content of vocabulary.json."""

    hash: str
    required: list[_Row]
    auxiliary: list[_Row]


@dataclass(frozen=True)
class WatchedSet:
    """Required tokens, then auxiliary ones. The automaton's columns are the first columns of W.

    Attributes:
        tokens: int32 [W], token ids; required ones ascending, auxiliary ones likeliest first.
        required: how many of them are required.
    """

    tokens: NDArray[np.int32]
    required: int

    @property
    def size(self) -> int:
        """W, the number of watched tokens."""
        return len(self.tokens)

    @property
    def hash(self) -> str:
        """Identity of the tokens and their order."""
        content = np.array([self.required, *self.tokens], "<i4").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def save(self, path: str, tokenizer: TextTokenizer) -> None:
        """Writes JSON that people can read too: each id beside its token."""
        rows = [{"id": int(t), "token": tokenizer.token(int(t))} for t in self.tokens]
        content = {"hash": self.hash, "required": rows[: self.required], "auxiliary": rows[self.required :]}
        storage.write_json(path, content)

    @staticmethod
    def load(path: str) -> WatchedSet:
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        content = storage.read_form(path, _File)
        ids = [row.id for row in content.required + content.auxiliary]
        watched = WatchedSet(np.array(ids, np.int32), len(content.required))
        if watched.hash != content.hash:
            raise UserError(f"{path} is damaged: its tokens are not those of its hash")
        return watched


def choose_watched(automaton: Automaton, mean_probability: NDArray[np.float64], auxiliary: int) -> WatchedSet:
    """The required tokens and the `auxiliary` likeliest others.

    Args:
        mean_probability: [V], mean probability of every token under the teacher at choice steps. V may be smaller or
            larger (padded) than the tokenizer's size.
        auxiliary: how many tokens to add; fewer are added where fewer have any probability.
    """
    others = mean_probability.copy()
    others[automaton.tokens] = 0.0
    order = np.argsort(-others, kind="stable")[:auxiliary]
    chosen = order[others[order] > 0].astype(np.int32)
    return WatchedSet(np.concatenate([automaton.tokens, chosen]), len(automaton.tokens))
