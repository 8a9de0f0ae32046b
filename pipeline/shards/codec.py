"""A lossy codec for logit shards: a few small whole numbers a step in place of one float16 a watched token.

What a step adds to the mean of its automaton state is turned into principal components, in units in which an error costs
about as much wherever it falls, and each is rounded to the same step. For Gaussian components that is reverse water-filling
(Cover and Thomas, "Elements of Information Theory", section 10.3.3): components narrower than the step cost next to nothing.
An error e in log-probabilities p costs about Σ softmax(x/T) e² / (2 T²) nats of KL at temperature T, from the Taylor series
of KL around zero. The step is chosen by error measured on held-out answers, not by that formula.

Shape suffixes: M steps of many answers, W watched tokens, S automaton states, P principal components, C columns of codes,
K temperatures, B bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.teacher.capture import TEMPERATURES

TARGET = {1: 1e-3, 2: 2e-3}  # mean KL over choice steps, nats, by temperature
MARGIN = 0.1  # of the target, that calibration asks of held-out steps: a tenth of the error costs few bytes
STEPS = 2.0 ** np.arange(1, -6, -0.25)  # roundings tried, the coarsest first
HELD_OUT = 4  # one in so many of the calibration's steps, the last ones
STATE_SHARE = 0.01  # weight of what tells states apart in the components, for states calibration did not meet
CHUNK = 1024  # steps handled at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class Codec:
    """Fitted tables. Log-probabilities are codes @ decoder + mean of the state.

    A component has one column of codes, its low byte; the first ones, wider than a byte, have another for the high byte.

    Attributes:
        means_SW: float32, nats, the mean of each state's steps; of all steps for states that calibration did not meet.
        encoder_WP: float32, from nats above the mean to components in units of the rounding.
        decoder_CW: float32, nats that one unit of each column of codes adds.
    """

    means_SW: NDArray[np.float32]
    encoder_WP: NDArray[np.float32]
    decoder_CW: NDArray[np.float32]

    @cached_property
    def offsets(self) -> NDArray[np.float32]:
        """The components of each state's mean."""
        return self.means_SW @ self.encoder_WP

    @property
    def components(self) -> int:
        """Number of principal components, P."""
        return self.encoder_WP.shape[1]

    @property
    def columns(self) -> int:
        """Number of codes a step, C."""
        return len(self.decoder_CW)

    @staticmethod
    def fit(logprobs_MW: NDArray[Any], states_M: NDArray[np.int64], forced_S: NDArray[np.bool_]) -> Codec:
        """Fits the codec to a calibration sample: the coarsest of `STEPS` whose error on held-out steps is in `TARGET`.

        Where none is, the finest: callers measure each shard's error in any case.

        Args:
            logprobs_MW: nats, steps of whole answers, one after another.

        Raises:
            ValueError: there are too few steps to hold some out.
        """
        cut = len(states_M) - len(states_M) // HELD_OUT
        if cut == len(states_M):
            raise ValueError(f"{len(states_M)} steps are too few to fit a codec")
        logprobs_MW = logprobs_MW.astype(np.float32)
        space = _Space.of(logprobs_MW[:cut], states_M[:cut], forced_S)
        held_MW, held_M = logprobs_MW[cut:], states_M[cut:]
        for step in STEPS:
            codec = space.codec(float(step))
            error_MK = divergence(held_MW, codec.decode(codec.encode(held_MW, held_M), held_M))
            if _within_target(error_MK, ~forced_S[held_M]):
                break
        return _Space.of(logprobs_MW, states_M, forced_S).codec(float(step))

    def encode(self, logprobs_MW: NDArray[Any], states_M: NDArray[np.int64]) -> NDArray[np.int8]:
        """Codes, int8 [M, C]. Components beyond their columns saturate; so do infinities, whichever way.

        Args:
            logprobs_MW: float16 or float32, nats.
        """
        codes_MC = np.empty((len(states_M), self.columns), np.int8)
        wide = self.columns - self.components
        limit_P = np.where(np.arange(self.components) < wide, 32639, 127).astype(np.float32)  # 127 × 256 + 127
        with np.errstate(invalid="ignore", over="ignore"):
            for part in _chunks(len(states_M)):
                units_MP = logprobs_MW[part].astype(np.float32, copy=False) @ self.encoder_WP
                units_MP -= self.offsets[states_M[part]]
                np.rint(units_MP, out=units_MP)
                np.fmin(np.fmax(units_MP, -limit_P, out=units_MP), limit_P, out=units_MP)  # NaN becomes a bound
                high_MP = np.floor((units_MP[:, :wide] + 128) / 256)  # so the low byte is from -128 to 127
                units_MP[:, :wide] -= 256 * high_MP
                codes_MC[part, : self.components] = units_MP
                codes_MC[part, self.components :] = high_MP
        return codes_MC

    def decode(self, codes_MC: NDArray[np.int8], states_M: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probabilities, float32 [M, W], nats; any selection of steps will do."""
        decoded_MW = np.empty((len(states_M), self.decoder_CW.shape[1]), np.float32)
        for part in _chunks(len(states_M)):
            np.matmul(codes_MC[part].astype(np.float32), self.decoder_CW, out=decoded_MW[part])
            decoded_MW[part] += self.means_SW[states_M[part]]
        return decoded_MW

    def save(self, path: str) -> None:
        """Writes the tables as safetensors."""
        storage.write_bytes(path, save_tensors({f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}))

    @staticmethod
    def load(path: str) -> Codec:
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        codec = Codec(**storage.read_tensors(path, {f.name: (np.float32, 2) for f in fields(Codec)}))
        watched, components = codec.encoder_WP.shape
        whole = (
            codec.means_SW.shape[1] == codec.decoder_CW.shape[1] == watched and components <= codec.columns <= 2 * components
        )
        if not whole or not all(np.isfinite(getattr(codec, f.name)).all() for f in fields(Codec)):
            raise UserError(f"{path} is damaged: its tables do not fit each other, or are not finite")
        return codec


def _chunks(steps: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, steps, CHUNK))


def _within_target(error_MK: NDArray[np.float64], choice_M: NDArray[np.bool_]) -> bool:
    """Whether choice steps, and all steps together, have a mean error well under the target."""
    groups = [error_MK, error_MK[choice_M]] if choice_M.any() else [error_MK]
    means = np.array([group.mean(0) for group in groups])
    return all(means[:, TEMPERATURES.index(t)].max() <= MARGIN * target for t, target in TARGET.items())


@dataclass(frozen=True)
class _Space:
    """Principal components of calibration steps, before it is known how finely they are rounded.

    Attributes:
        means_SW: float32, as in `Codec`.
        scale_W: float64, what a nat of each token weighs.
        variances_W: float64, of the components in weighed nats, the widest first.
        axes_WW: float64, the components as columns.
        reach_W: float64, the largest value of each component seen.
    """

    means_SW: NDArray[np.float32]
    scale_W: NDArray[np.float64]
    variances_W: NDArray[np.float64]
    axes_WW: NDArray[np.float64]
    reach_W: NDArray[np.float64]

    @staticmethod
    def of(logprobs_MW: NDArray[np.float32], states_M: NDArray[np.int64], forced_S: NDArray[np.bool_]) -> _Space:
        """Choice steps count as much as all steps together, however few they are."""
        choice_M = ~forced_S[states_M]
        choice_M = choice_M if choice_M.any() else np.ones_like(choice_M)
        scale_W = importance(logprobs_MW[choice_M]) ** 0.25  # half way, in logarithms, between equal steps and equal cost
        means_SW = _state_means(logprobs_MW, states_M, len(forced_S))
        rest_MW = (logprobs_MW - means_SW[states_M]) * scale_W
        between_MW = (means_SW[states_M] - means_SW[states_M].mean(0)) * scale_W
        moments = [_second_moment(rows) for rows in (rest_MW, rest_MW[choice_M], between_MW)]
        variances_W, axes_WW = np.linalg.eigh((moments[0] + moments[1]) / 2 + STATE_SHARE * moments[2])
        variances_W, axes_WW = variances_W[::-1], axes_WW[:, ::-1]
        return _Space(means_SW, scale_W, variances_W, axes_WW, np.abs(rest_MW @ axes_WW).max(0))

    def codec(self, step: float) -> Codec:
        """The codec that rounds to multiples of `step`; components are dropped where rounding would cost as much as they hold.

        A uniform rounding to multiples of Δ has the variance Δ² / 12. A component gets two bytes where it was seen to use
        half of one's range, and so do all before it.
        """
        kept = max(1, int((self.variances_W > step**2 / 12).sum()))
        wide = max((i + 1 for i in range(kept) if self.reach_W[i] / step > 64), default=0)
        axes_WP = self.axes_WW[:, :kept]
        low_PW = step * (axes_WP / self.scale_W[:, None]).T
        return Codec(
            means_SW=self.means_SW,
            encoder_WP=np.ascontiguousarray(self.scale_W[:, None] * axes_WP / step, np.float32),
            decoder_CW=np.concatenate([low_PW, 256 * low_PW[:wide]]).astype(np.float32),
        )


def importance(logprobs_MW: NDArray[np.float32]) -> NDArray[np.float64]:
    """What an error in each token costs, float64 [W], mean 1: the sum of mean softmax(x / T) / T³ over `TEMPERATURES`.

    The cost goes with 1 / T², and errors twice as large are tolerable at twice the temperature. No less than a millionth.
    """
    cost_W = sum(np.exp(_log_softmax(logprobs_MW / t)).mean(0) / t**3 for t in TEMPERATURES)
    return np.maximum(cost_W / np.mean(cost_W), 1e-6)


def _state_means(logprobs_MW: NDArray[np.float32], states_M: NDArray[np.int64], states: int) -> NDArray[np.float32]:
    means_SW = np.repeat(logprobs_MW.mean(0, dtype=np.float64)[None], states, axis=0)
    order = np.argsort(states_M, kind="stable")
    seen, starts, counts = np.unique(states_M[order], return_index=True, return_counts=True)
    means_SW[seen] = np.add.reduceat(logprobs_MW[order].astype(np.float64), starts) / counts[:, None]
    return means_SW.astype(np.float32)


def _second_moment(rows_MW: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows_MW.T @ rows_MW / len(rows_MW)


def _log_softmax(logits_MW: NDArray[Any]) -> NDArray[np.float64]:
    shifted_MW = logits_MW.astype(np.float64) - logits_MW.max(-1, keepdims=True)
    return shifted_MW - np.log(np.exp(shifted_MW).sum(-1, keepdims=True))


def divergence(true_MW: NDArray[Any], decoded_MW: NDArray[Any]) -> NDArray[np.float64]:
    """KL(softmax(true / T) ‖ softmax(decoded / T)) over the watched tokens at `TEMPERATURES`: float64 [M, K], nats."""
    result_MK = np.empty((len(true_MW), len(TEMPERATURES)))
    for part in _chunks(len(true_MW)):
        true, decoded = true_MW[part].astype(np.float64), decoded_MW[part].astype(np.float64)
        for k, t in enumerate(TEMPERATURES):
            log_p, log_q = _log_softmax(true / t), _log_softmax(decoded / t)
            result_MK[part, k] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return np.maximum(result_MK, 0)  # rounding alone goes below


def within_target(error: ErrorSummary) -> bool:
    """Whether mean errors are within `TARGET`."""
    return all(error.mean()[TEMPERATURES.index(t)] <= target for t, target in TARGET.items())


BINS_A_DECADE = 20
EDGES = 10.0 ** (np.arange(-8 * BINS_A_DECADE, 3 * BINS_A_DECADE + 1) / BINS_A_DECADE)  # nats, from 1e-8 to 1000


@dataclass(frozen=True)
class ErrorSummary:
    """Errors of many steps in a few numbers that add up over shards.

    Attributes:
        sums_K: float64, nats.
        counts_KB: int64, steps by error: bin b holds errors over EDGES[b - 1] up to EDGES[b]; the first also less, the last
            more.
    """

    sums_K: NDArray[np.float64]
    counts_KB: NDArray[np.int64]

    @staticmethod
    def of(errors_MK: NDArray[np.float64]) -> ErrorSummary:
        """The summary of what `divergence` returned."""
        bins_MK = np.searchsorted(EDGES, errors_MK)
        counts = [np.bincount(bins_M, minlength=len(EDGES) + 1) for bins_M in bins_MK.T]
        return ErrorSummary(errors_MK.sum(0), np.array(counts, np.int64))

    def merge(self, other: ErrorSummary) -> ErrorSummary:
        """The summary of both together."""
        return ErrorSummary(self.sums_K + other.sums_K, self.counts_KB + other.counts_KB)

    @property
    def steps(self) -> int:
        """How many steps it speaks of."""
        return int(self.counts_KB[0].sum())

    def mean(self) -> NDArray[np.float64]:
        """Mean error by temperature, float64 [K], nats; 0 of no steps."""
        return self.sums_K / max(1, self.steps)

    def percentile(self, q: float) -> NDArray[np.float64]:
        """An error, float64 [K], that q per cent of steps do not exceed: a bin's upper edge, so at most 12 % too high."""
        rank = max(1, int(np.ceil(self.steps * q / 100)))
        bins_K = (self.counts_KB.cumsum(1) >= rank).argmax(1)
        return np.append(EDGES, np.inf)[bins_K]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; empty bins are left out."""
        counts = [{str(b): int(row[b]) for b in np.flatnonzero(row)} for row in self.counts_KB]
        return {"sums": self.sums_K.tolist(), "counts": counts}

    @staticmethod
    def from_json(content: dict[str, Any]) -> ErrorSummary:
        """Reads what `to_json` gave."""
        counts_KB = np.zeros((len(content["counts"]), len(EDGES) + 1), np.int64)
        for row, counts in zip(counts_KB, content["counts"], strict=True):
            for b, count in counts.items():
                row[int(b)] = count
        return ErrorSummary(np.array(content["sums"], np.float64), counts_KB)


LSE_UNITS = np.array([64] + [2048] * (len(TEMPERATURES) - 1))  # a nat, in the units of each column


def pack_lse(lse_MK: NDArray[np.float32]) -> NDArray[np.int16]:
    """Log-sum-exps in fixed point, int16 [M, K]: at T = 1 itself, at other T what lse_T has beyond lse_1 / T.

    The latter is all that probabilities need, x / T − (lse_T − lse_1 / T); it lies between 0 and ln(vocabulary) and is
    kept to 1/4096 nat. The former is an additive constant of the raw logits: kept to 1/128 nat, within ±512.
    """
    beyond_MK = lse_MK.astype(np.float64)
    beyond_MK[:, 1:] -= beyond_MK[:, :1] / TEMPERATURES[1:]
    return np.clip(np.rint(beyond_MK * LSE_UNITS), -32768, 32767).astype(np.int16)


def unpack_lse(packed_MK: NDArray[np.int16]) -> NDArray[np.float32]:
    """Log-sum-exps, float32 [M, K], from what `pack_lse` gave."""
    lse_MK = packed_MK / LSE_UNITS
    lse_MK[:, 1:] += lse_MK[:, :1] / TEMPERATURES[1:]
    return lse_MK.astype(np.float32)
