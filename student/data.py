"""Shards to batches: the examples of one split in memory, and any step's batch by seed, epoch and index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.compiled import CompiledTask
from pipeline.errors import UserError
from pipeline.manifest import Shards
from pipeline.shards import ShardTable

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_TENTHS = {TRAIN: range(8), VALIDATION: range(8, 9), TEST: range(9, 10)}


def split_of(text: str) -> str:
    """The split of a comment, by a hash of its text without case and spacing: a repeated comment stays in one split."""
    normal = " ".join(text.casefold().split())
    tenth = int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "big") % 10
    return next(split for split, tenths in SPLIT_TENTHS.items() if tenth in tenths)


@dataclass(frozen=True)
class Batch:
    """B examples of at most T tokens, and the M positions with a target among them.

    Attributes:
        tokens: int64 [B, T], comment, separator and answer inputs, padded on the right.
        predict: int64 [M], positions in the flattened [B × T].
        targets: int64 [M], column of the teacher's token in W.
        teacher: float32 [M, W], the teacher's logits, as log-probabilities under its full vocabulary.
        choice: bool [M], whether the automaton leaves a choice there.
    """

    tokens: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    teacher: torch.Tensor
    choice: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Examples:
    """The examples of one split. N examples, M answer steps of all of them together.

    Attributes:
        texts: the comments.
        prefixes: int32 token ids of each comment and the separator.
        answers: int32 token ids of each answer, end token last.
        starts: int64 [N + 1], where each answer's steps start in what follows.
        targets: int64 [M], columns in W.
        choice: bool [M].
        teacher: float16 [M, W], log-probabilities.
    """

    texts: list[str]
    prefixes: list[NDArray[np.int32]]
    answers: list[NDArray[np.int32]]
    starts: NDArray[np.int64]
    targets: NDArray[np.int64]
    choice: NDArray[np.bool_]
    teacher: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The batch of these examples, in this order."""
        rows = [np.concatenate([self.prefixes[i], self.answers[i][:-1]]) for i in indices]
        length = max(map(len, rows))
        tokens = np.zeros((len(rows), length), np.int64)
        predict, steps = [], []
        for row, (i, ids) in enumerate(zip(indices, rows, strict=True)):
            tokens[row, : len(ids)] = ids
            first = len(self.prefixes[i]) - 1  # the separator's last token predicts the answer's first
            predict.append(np.arange(row * length + first, row * length + len(ids)))
            steps.append(np.arange(self.starts[i], self.starts[i + 1]))
        at = np.concatenate(steps)
        return Batch(
            tokens=torch.from_numpy(tokens),
            predict=torch.from_numpy(np.concatenate(predict)),
            targets=torch.from_numpy(self.targets[at]),
            teacher=torch.from_numpy(self.teacher[at].astype(np.float32)),
            choice=torch.from_numpy(self.choice[at]),
        )


def require_all_steps(shards: Shards) -> None:
    """Refuses shards that lack the logits of some steps.

    Raises:
        UserError: they hold those of choice steps alone.
    """
    if shards.manifest["kept_steps"] < shards.manifest["steps"]:
        raise UserError(f"{shards.folder} holds the logits of choice steps alone: extract with --set extract.capture=all")


def load_answers(shards: Shards, split: str) -> tuple[list[str], list[list[int]]]:
    """The comments of one split and the tokens of the teacher's answers, without their logits."""
    require_all_steps(shards)
    parts = [_take(table, split) for table in shards.tables()]
    return [t for part in parts for t in part["texts"]], [a.tolist() for part in parts for a in part["answers"]]


def load_examples(shards: Shards, split: str, limit: int | None = None) -> Examples:
    """The examples of one split of an extraction, at most `limit` of them.

    Raises:
        UserError: the split is empty, or the shards hold the logits of choice steps alone.
    """
    require_all_steps(shards)
    parts: list[dict[str, Any]] = []
    for table in shards.tables():
        room = None if limit is None else limit - sum(len(part["texts"]) for part in parts)
        if room == 0:
            break
        parts.append(_take(table, split, room))
    texts = [text for part in parts for text in part["texts"]]
    if not texts:
        raise UserError(f"no example falls in the {split} split: {shards.manifest['rows']} examples are too few")
    answers, automaton = [answer for part in parts for answer in part["answers"]], shards.compiled.automaton
    separator = np.array(shards.compiled.tokenizer.encode([shards.compiled.task.separator])[0], np.int32)
    flat = np.concatenate(answers)
    return Examples(
        texts=texts,
        prefixes=[np.concatenate([comment, separator]) for part in parts for comment in part["comments"]],
        answers=answers,
        starts=np.concatenate([[0], np.cumsum([len(answer) for answer in answers])]),
        targets=columns_of(shards.compiled, flat),
        choice=~automaton.forced[automaton.states_before(answers)],
        teacher=np.concatenate([part["teacher"] for part in parts]),
    )


def _take(table: ShardTable, split: str, room: int | None = None) -> dict[str, Any]:
    """The rows of a shard that fall in a split, at most `room` of them."""
    mine = [i for i, text in enumerate(table.texts) if split_of(text) == split][:room]
    ends = np.cumsum(table.lengths)
    spans = [slice(ends[i] - table.lengths[i], ends[i]) for i in mine]
    steps = np.zeros(len(table.answers), bool)
    for span in spans:
        steps[span] = True
    return {
        "texts": [table.texts[i] for i in mine],
        "comments": [table.comments[i] for i in mine],
        "answers": [table.answers[span] for span in spans],
        "teacher": table.logprobs[steps],
    }


def columns_of(compiled: CompiledTask, tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where required tokens stand in W."""
    return np.searchsorted(compiled.automaton.tokens, tokens).astype(np.int64)


@dataclass(frozen=True)
class Order:
    """Which examples each worker sees at each step: a permutation drawn from (seed, epoch), cut into global batches.

    The last, incomplete batch of an epoch is left out; the next epoch's permutation leaves out others.
    """

    examples: int
    batch_size: int
    seed: int
    rank: int
    workers: int

    @property
    def steps(self) -> int:
        """Steps of an epoch.

        Raises:
            UserError: there are fewer examples than one batch takes, or fewer in a batch than workers.
        """
        if self.examples < self.batch_size or self.batch_size < self.workers:
            raise UserError(
                f"{self.examples} training examples, batches of {self.batch_size}, {self.workers} workers: each batch needs "
                "that many examples, and each worker at least one of them"
            )
        return self.examples // self.batch_size

    def epoch(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """This worker's share of each step's examples."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
        for step in range(self.steps):
            yield order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.workers]
