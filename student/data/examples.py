"""The examples of an extraction, memory-mapped: any of them in any order, at the cost of those alone.

N examples, M answer steps of all of them together, C of these with their logits, W watched tokens, K temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from pipeline.shards.payload import Compact, Stored
from pipeline.task.compiled import CompiledTask
from student.data.unpack import reader_columns, unpack
from student.model.model import Student
from student.model.reader import Reader, side_by_side
from student.model.shape import ReaderShape


@dataclass(frozen=True)
class Batch:
    """B examples of at most T tokens, and the M positions with a target among them.

    Attributes:
        tokens: int64 [B, T], comment, separator and answer inputs, padded on the right.
        predict: int64 [M], positions in the flattened [B × T].
        targets: int64 [M], column of the teacher's token in W.
        teacher: float16 [M, W], the teacher's logits, as log-probabilities under its full vocabulary.
        lse: float32 [M, K], the teacher's log-sum-exps.
        choice: bool [M], whether the automaton leaves a choice there.
        state: int64 [M], the automaton's state there.
        text: for a reader, its ids of the texts, int64 [B, L], and their lengths [B]; their vectors take the first places.
    """

    tokens: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    teacher: torch.Tensor
    lse: torch.Tensor
    choice: torch.Tensor
    state: torch.Tensor
    text: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        text = None if self.text is None else (self.text[0].to(device), self.text[1].to(device))
        rest: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if k != "text"}
        return Batch(**rest, text=text)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What a student is called with."""
        return (self.tokens, self.predict) if self.text is None else (self.tokens, self.predict, self.text)


@dataclass(frozen=True)
class Examples:
    """The examples of one split, as a student of one kind of sequence reads them.

    Attributes:
        columns: by name, see `student.data.unpack`.
        compiled: the task.
        stored: the logits of the C steps.
        choices_only: leave forced tokens out.
        separator: int32, ids between comment and answer.
        reader: of the texts, whose ids are in place of the comments' tokens; None for the student itself.
    """

    columns: dict[str, NDArray[Any]]
    compiled: CompiledTask
    stored: Stored
    choices_only: bool
    separator: NDArray[np.int32]
    reader: ReaderShape | None = None

    def __len__(self) -> int:
        return len(self.columns["choice_starts"]) - 1

    @property
    def _positions(self) -> str:
        """The column that counts positions with a target."""
        return "choice_starts" if self.choices_only else "answer_starts"

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens the student reads of each example, [N]: the last target is never read."""
        comments, positions = (np.diff(self.columns[starts]) for starts in ("comment_starts", self._positions))
        return (comments + len(self.separator) + positions - 1).astype(np.int32)

    def weight(self, indices: NDArray[np.int64], forced_weight: float) -> float:
        """What the positions of these examples weigh together, a choice step 1 and a forced step `forced_weight`."""
        choices = int(self._counts("choice_starts", indices).sum())
        return choices + forced_weight * (int(self._counts(self._positions, indices).sum()) - choices)

    def _counts(self, starts: str, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.columns[starts][indices + 1] - self.columns[starts][indices]

    def text(self, index: int) -> str:
        """The comment."""
        start, end = self.columns["text_starts"][index : index + 2]
        return self.columns["text"][start:end].tobytes().decode()

    def prefix(self, index: int) -> NDArray[np.int32]:
        """Token ids of the comment and the separator, or the reader's ids."""
        start, end = self.columns["comment_starts"][index : index + 2]
        return np.concatenate([self.columns["comment"][start:end], self.separator])

    def answer(self, index: int) -> NDArray[np.int32]:
        """Token ids of the teacher's whole answer, end token last."""
        start, end = self.columns["answer_starts"][index : index + 2]
        return self.columns["answer"][start:end]

    def gold(self, index: int) -> NDArray[np.int32]:
        """Token ids of people's label, end token last; none where there is none."""
        start, end = self.columns["gold_starts"][index : index + 2]
        return self.columns["gold"][start:end]

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The batch of these examples, in this order."""
        steps, logits = self._steps(indices)
        answer, states = self.columns["answer"][steps], self.columns["state"][steps]
        comments, positions = self._counts("comment_starts", indices), self._counts(self._positions, indices)
        prefixes = comments + len(self.separator)
        if self.reader and self.reader.pools:
            prefixes = np.ones_like(comments)
        length = int((prefixes + positions).max()) - 1
        rows = np.arange(len(indices)) * length
        tokens = np.zeros(len(indices) * length, np.int64)
        if self.reader is None:
            tokens[_ranges(rows, comments)] = self.columns["comment"][
                _ranges(self.columns["comment_starts"][indices], comments)
            ]
            tokens[(rows + comments)[:, None] + np.arange(len(self.separator))] = self.separator
        predict = _ranges(rows + prefixes - 1, positions)  # the separator's last token predicts the answer's first
        read = np.ones(len(predict), bool)
        read[np.cumsum(positions) - 1] = False  # an answer's last token is only a target
        tokens[predict[read] + 1] = answer[read]
        return Batch(
            tokens=torch.from_numpy(tokens).view(len(indices), length),
            predict=torch.from_numpy(predict),
            targets=torch.from_numpy(columns_of(self.compiled, answer)),
            teacher=torch.from_numpy(self.stored.logprobs(logits, states)),
            lse=torch.from_numpy(self.stored.lse[logits]),
            choice=torch.from_numpy(~self.compiled.automaton.forced[states]),
            state=torch.from_numpy(states.astype(np.int64)),
            text=side_by_side([self.prefix(int(i)) for i in indices]) if self.reader else None,
        )

    def batches(self, indices: NDArray[np.int64], size: int) -> Iterator[Batch]:
        """These examples in batches of `size`."""
        return (self.batch(indices[start : start + size]) for start in range(0, len(indices), size))

    def _steps(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the M steps have a target in these examples, and which of the C rows of logits are theirs."""
        steps = _ranges(self.columns["answer_starts"][indices], self._counts("answer_starts", indices))
        logits = _ranges(self.columns["kept_starts"][indices], self._counts("kept_starts", indices))
        if not self.choices_only:
            return steps, logits
        choice = ~self.compiled.automaton.forced[self.columns["state"][steps]]
        return steps[choice], logits[choice[self.columns["kept"][steps]]]

    def first(self, count: int | None) -> Examples:
        """At most so many of them."""
        if count is None:
            return self
        columns = {n: column[: count + 1] if n.endswith("_starts") else column for n, column in self.columns.items()}
        return replace(self, columns=columns)


def open_examples(
    shards: Shards,
    split: str,
    sequence: str,
    separator: tuple[int, ...] | None = None,
    reader: Reader | None = None,
) -> Examples:
    """The examples of one split of an extraction.

    Args:
        split: `train`, `validation` or `test`.
        sequence: `full` or `choices`.
        separator: ids between comment and answer; by default the task's.
        reader: of the texts, where it is not the student itself.

    Raises:
        UserError: the split is empty, or whole answers are wanted of shards with the logits of choice steps alone.
    """
    if sequence == "full" and shards.manifest.kept_steps < shards.manifest.steps:
        raise UserError(
            f"{shards.folder} holds the logits of choice steps alone: train with student.sequence=choices"
            + (", or extract with extract.capture=all" if shards.manifest.teacher.model else "")
        )
    if sequence == "choices" and shards.compiled.automaton.forced[:-1].all():
        raise UserError("the task has one answer alone: there is no choice to train a student on")
    columns = unpack(shards)[split]
    if not columns or len(columns["choice_starts"]) == 1:
        raise UserError(f"no example falls in the {split} split: {shards.manifest.rows} examples are too few")
    compact = Compact.load(shards.folder, shards.compiled.automaton) if columns["values"].dtype == np.int8 else None
    stored = Stored(columns["values"], columns["lse"], compact.codec if compact else None)
    between = np.array(shards.compiled.separator if separator is None else separator, np.int32)
    if reader is not None:
        columns = columns | reader_columns(shards, split, columns, reader)
    shape = reader.shape if reader else None
    return Examples(columns, shards.compiled, stored, sequence == "choices", between, shape)


def student_examples(shards: Shards, split: str, model: Student) -> Examples:
    """The examples of one split as a student reads them; see `open_examples`."""
    return open_examples(shards, split, model.shape.sequence, model.shape.separator, model.reader)


def columns_of(compiled: CompiledTask, tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where required tokens stand in W."""
    return np.searchsorted(compiled.automaton.tokens, tokens).astype(np.int64)


def _ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """start, start + 1, … of each length, one after another."""
    ends = np.cumsum(lengths)
    offsets = np.repeat(np.asarray(starts, np.int64) - (ends - lengths), lengths)
    return offsets + np.arange(ends[-1] if len(ends) else 0)
