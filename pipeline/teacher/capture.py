"""What is read off a teacher's raw logits at each step, before any constraint. Plain PyTorch: any engine can feed it.

Shape suffixes: N rows of a step, V teacher's vocabulary, W watched tokens, R required tokens, S automaton states,
T steps of an answer, K temperatures.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.task.automaton import Automaton

TEMPERATURES = (1, 2, 4)
CACHED = 1 << 20  # logits that a CPU's cache holds over several passes: two to four times as fast as all at once


class Observer(Protocol):
    """Sees the raw logits of every step of every answer."""

    def observe(
        self, logits_NV: torch.Tensor, states_N: torch.Tensor, rows_N: NDArray[np.int64], steps_N: NDArray[np.int64]
    ) -> None:
        """Reads one step.

        Args:
            logits_NV: float32 raw logits; they may be changed after the call, so what is kept must be copied.
            states_N: int64, the automaton state each row is in.
            rows_N: which answer of the batch each row belongs to; -1 for rows to pass over.
            steps_N: how many tokens that answer has so far. A step seen twice replaces what was seen first: engines
                run a step again after preemption, and show rows early while a prompt is read in chunks.
        """


def log_sum_exp(logits_NV: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over the full vocabulary of logits / T for each of `TEMPERATURES`: float32 [N, K].

    With u = exp((z - max z) / 4), T = 4, 2 and 1 are the sums of u, u² and u⁴: one exponential for three.
    """
    if logits_NV.is_cpu and len(logits_NV) > (rows := max(1, CACHED // logits_NV.shape[1])):
        return torch.cat([log_sum_exp(part) for part in torch.split(logits_NV, rows)])
    peak_N1 = logits_NV.amax(-1, keepdim=True)
    u = ((logits_NV - peak_N1) / 4).exp_()
    sums = []
    for _ in TEMPERATURES:  # T = 4, then 2, then 1
        sums.append(u.sum(-1))
        u.square_()
    return torch.stack(sums[::-1], -1).log() + peak_N1 / torch.tensor(TEMPERATURES, device=u.device)


@dataclass(frozen=True)
class Captured:
    """The teacher's answers to a batch of prompts with what was watched at every step. Padded to the longest answer.

    Attributes:
        tokens: int32 [N, T], answers with their end token; 0 behind it.
        lengths: int32 [N], tokens of each answer.
        kept: bool [N, T], the steps whose logits were kept; the others' are 0.
        logits: float32 [N, T, W], raw logits of the watched tokens.
        lse: float32 [N, T, K], log-sum-exp of the full vocabulary at `TEMPERATURES`.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    kept: NDArray[np.bool_]
    logits: NDArray[np.float32]
    lse: NDArray[np.float32]

    def finite(self) -> NDArray[np.bool_]:
        """Whether all that was kept of each answer is finite: bool [N]."""
        return np.logical_and(np.isfinite(self.logits).all((1, 2)), np.isfinite(self.lse).all((1, 2)))

    def select(self, rows: NDArray[np.bool_]) -> Captured:
        """Some of the answers, in order."""
        return Captured(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def join(parts: list[Captured]) -> Captured:
        """The answers of several batches, one after another."""
        longest = max(part.tokens.shape[1] for part in parts)
        columns = [[_widen(getattr(part, field.name), longest) for part in parts] for field in fields(Captured)]
        return Captured(*(np.concatenate(column) for column in columns))


def nothing(width: int) -> Captured:
    """No answer, of so many watched tokens."""
    floats = (np.zeros((0, 0, size), np.float32) for size in (width, len(TEMPERATURES)))
    return Captured(np.zeros((0, 0), np.int32), np.zeros(0, np.int32), np.zeros((0, 0), np.bool_), *floats)


def _widen(values: NDArray[Any], steps: int) -> NDArray[Any]:
    """Pads [N, T, ...] with zeros to `steps`; leaves [N] as it is."""
    if values.ndim == 1:
        return values
    return np.pad(values, [(0, 0), (0, steps - values.shape[1]), *[(0, 0)] * (values.ndim - 2)])


@dataclass(frozen=True)
class Seen:
    """What was kept of some answers, in the order in which it was seen.

    Attributes:
        rows: int64 [n], of each observation the answer.
        steps: int64 [n], and its step.
        values: float32 [n, W + K], watched logits and log-sum-exp.
    """

    rows: NDArray[np.int64]
    steps: NDArray[np.int64]
    values: NDArray[np.float32]

    def by_answer(self, answers: list[list[int]], wanted_NT: NDArray[np.bool_]) -> Captured:
        """The wanted steps of each answer.

        Raises:
            RuntimeError: a wanted step's logits were not seen, or logits without a token were.
        """
        rows, steps, values = self.rows, self.steps, self.values
        lengths = np.array([len(answer) for answer in answers], np.int32)
        if (rows >= len(lengths)).any() or (steps >= lengths[rows]).any():
            raise RuntimeError("logits were captured that no token of the answers has")
        mine, seen_NT = wanted_NT[rows, steps], np.zeros_like(wanted_NT)
        seen_NT[rows, steps] = True
        if (wanted_NT & ~seen_NT).any():
            raise RuntimeError("tokens of the answers have no captured logits")
        values_NTX = np.zeros((*wanted_NT.shape, values.shape[1]), np.float32)
        values_NTX[rows[mine], steps[mine]] = values[mine]  # the last of equal indices stays
        tokens = np.zeros(wanted_NT.shape, np.int32)
        for row, answer in enumerate(answers):
            tokens[row, : len(answer)] = answer
        W = values.shape[1] - len(TEMPERATURES)
        return Captured(tokens, lengths, wanted_NT, values_NTX[..., :W], values_NTX[..., W:])


class Recorder(Observer):
    """Keeps the watched logits and the log-sum-exp of every step, on the logits' device until drained."""

    def __init__(self, watched: NDArray[np.int32], device: torch.device) -> None:
        self._watched = torch.as_tensor(watched, dtype=torch.int64, device=device)
        self._rows: list[NDArray[np.int64]] = []
        self._steps: list[NDArray[np.int64]] = []
        self._values: list[torch.Tensor] = []  # [n, W + K] each, in one piece so that one copy brings all to the host

    def observe(
        self, logits_NV: torch.Tensor, states_N: torch.Tensor, rows_N: NDArray[np.int64], steps_N: NDArray[np.int64]
    ) -> None:
        """See `Observer`."""
        self._rows.append(rows_N)
        self._steps.append(steps_N)
        self._values.append(torch.cat([logits_NV.index_select(1, self._watched), log_sum_exp(logits_NV)], 1))

    def missing(self, wanted_NT: NDArray[np.bool_], first: int = 0) -> list[int]:
        """Answers of which a wanted step was not seen, the first of them being row `first`."""
        seen_NT = np.zeros_like(wanted_NT)
        for rows, steps in zip(self._rows, self._steps, strict=True):
            rows = rows - first
            inside = (rows >= 0) & (rows < len(seen_NT)) & (steps < seen_NT.shape[1])
            seen_NT[rows[inside], steps[inside]] = True
        return np.flatnonzero((wanted_NT & ~seen_NT).any(1)).tolist()

    def forget(self, rows: list[int]) -> None:
        """Drops what was seen of some rows."""
        self._rows = [np.where(np.isin(seen, rows), -1, seen) for seen in self._rows]

    def take(self, first: int, count: int) -> Seen:
        """What was seen of so many rows, which is forgotten. It leaves the device here; the other rows' stays."""
        rows = np.concatenate([np.zeros(0, np.int64), *self._rows])
        steps = np.concatenate([np.zeros(0, np.int64), *self._steps])
        empty = torch.zeros(0, len(self._watched) + len(TEMPERATURES), device=self._watched.device)
        values = torch.cat([empty, *self._values])
        mine = (rows >= first) & (rows < first + count)
        others = (rows >= 0) & ~mine
        self._rows, self._steps, self._values = [rows[others]], [steps[others]], [_chosen(values, others)]
        return Seen(rows[mine] - first, steps[mine], _chosen(values, mine).cpu().numpy())

    def drain(self, answers: list[list[int]], wanted_NT: NDArray[np.bool_]) -> Captured:
        """All that was seen since the last drain, by answer; see `Seen.by_answer`."""
        return self.take(0, sys.maxsize).by_answer(answers, wanted_NT)


def _chosen(values: torch.Tensor, rows: NDArray[np.bool_]) -> torch.Tensor:
    return values if rows.all() else values[torch.as_tensor(rows, device=values.device)]  # the copy is worth avoiding


@dataclass(frozen=True)
class CensusResult:
    """What calibration measured, before the constraint.

    Attributes:
        mean_probability: float64 [V], of each token at choice steps.
        allowed_mass: float64 [S], mean probability on the tokens a state allows; 1 where never visited.
        visits: int64 [S].
        preferred: by state visited, the disallowed token that leads the others: each visit counts the likeliest one's
            probability.
    """

    mean_probability: NDArray[np.float64]
    allowed_mass: NDArray[np.float64]
    visits: NDArray[np.int64]
    preferred: dict[int, int]


@dataclass(frozen=True)
class _Sighting:
    """One row's last step as far as seen."""

    step: int
    state: int
    mass: float
    rival: int
    rival_probability: float
    probability_V: torch.Tensor | None  # of a choice step alone: the only ones that are summed


class Census(Observer):
    """Sums the teacher's probabilities by automaton state. Each (row, step) counts once, the last time it is seen."""

    def __init__(self, automaton: Automaton, device: torch.device) -> None:
        self._forced = automaton.forced
        self._allowed_SR = torch.as_tensor(automaton.allowed, device=device)
        self._tokens = torch.as_tensor(automaton.tokens, dtype=torch.int64, device=device)
        self._choice_sum_V: torch.Tensor | None = None
        self._mass = np.zeros(automaton.states)
        self._visits = np.zeros(automaton.states, np.int64)
        self._rivals: dict[int, Counter[int]] = defaultdict(Counter)
        self._last: dict[int, _Sighting] = {}

    def observe(
        self, logits_NV: torch.Tensor, states_N: torch.Tensor, rows_N: NDArray[np.int64], steps_N: NDArray[np.int64]
    ) -> None:
        """See `Observer`."""
        probability_NV = logits_NV.softmax(-1)
        if self._choice_sum_V is None:
            self._choice_sum_V = logits_NV.new_zeros(logits_NV.shape[1], dtype=torch.float64)
        allowed_NR = self._allowed_SR[states_N]
        required_NR = probability_NV[:, self._tokens]
        rivals_NV = probability_NV.clone()
        rivals_NV[:, self._tokens] = required_NR * ~allowed_NR
        rival = rivals_NV.max(-1)
        columns = states_N, (required_NR * allowed_NR).sum(-1), rival.indices, rival.values
        lists = [rows_N.tolist(), steps_N.tolist(), *(column.tolist() for column in columns)]
        for i, (row, step, state, mass, token, likely) in enumerate(zip(*lists, strict=True)):
            if row >= 0:
                self._settle(row, unless=step)
                kept_V = None if self._forced[state] else probability_NV[i].clone()  # a view would keep all rows of the step
                self._last[row] = _Sighting(step, state, mass, token, likely, kept_V)

    def _settle(self, row: int, unless: int | None) -> None:
        """Counts a row's last step, unless it is being seen again."""
        seen = self._last.get(row)
        if seen is None or seen.step == unless:
            return
        self._mass[seen.state] += seen.mass
        self._visits[seen.state] += 1
        self._rivals[seen.state][seen.rival] += seen.rival_probability  # type: ignore[assignment]
        if seen.probability_V is not None and self._choice_sum_V is not None:
            self._choice_sum_V += seen.probability_V

    def drain(self) -> CensusResult:
        """The sums as means."""
        for row in self._last:
            self._settle(row, unless=None)
        self._last = {}
        if self._choice_sum_V is None or not self._visits.any():
            raise RuntimeError("calibration saw no step")
        choices = max(1, int(self._visits[~self._forced].sum()))
        return CensusResult(
            mean_probability=(self._choice_sum_V / choices).cpu().numpy(),
            allowed_mass=np.where(self._visits > 0, self._mass / np.maximum(self._visits, 1), 1.0),
            visits=self._visits,
            preferred={state: rivals.most_common(1)[0][0] for state, rivals in self._rivals.items()},
        )


class Constraint:
    """The automaton's tables on the logits' device."""

    def __init__(self, automaton: Automaton, device: torch.device) -> None:
        self._tokens = torch.as_tensor(automaton.tokens, dtype=torch.int64, device=device)
        self._next_SR = torch.as_tensor(automaton.next_state, dtype=torch.int64, device=device)
        self._end = automaton.end

    def apply(self, logits_NV: torch.Tensor, states_N: torch.Tensor) -> None:
        """Leaves, in place, only the tokens each row's state allows; rows at the end or outside (-1) stay as they are."""
        inside = (states_N >= 0) & (states_N != self._end)
        required_NR = logits_NV.index_select(1, self._tokens)
        allowed_NR = self._next_SR[states_N] >= 0
        finite_NR = required_NR.nan_to_num()  # an answer stays an answer, so that a row with broken logits can be told by them
        masked_NR = finite_NR.where(allowed_NR, -torch.inf)
        logits_NV.masked_fill_(inside[:, None], -torch.inf)
        logits_NV[:, self._tokens] = masked_NR.where(inside[:, None], required_NR)

    def advance(self, states_N: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
        """The states after one more token each."""
        columns_N = torch.searchsorted(self._tokens, tokens_N)
        return self._next_SR[states_N, columns_N.clamp_max(len(self._tokens) - 1)]
