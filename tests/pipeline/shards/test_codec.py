"""The lossy codec of logit shards, against errors computed here by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.codec import MARGIN, TARGET, Codec, ErrorSummary, divergence, pack_lse, unpack_lse
from pipeline.shards.payload import COMPACT, FLOAT16, Compact, encode
from pipeline.task.automaton import Automaton

WATCHED, RANK = 24, 6
FORCED = np.array([True, False, True, False, True, True])  # the last two states are never in the calibration
Steps = tuple[np.ndarray, np.ndarray]


def made_up(steps: int, seed: int) -> Steps:
    """Log-probabilities of few dimensions beyond their state's mean, with a leftover mass outside."""
    shape, noise = np.random.default_rng(0), np.random.default_rng(seed)
    means, axes = shape.normal(0, 3, (4, WATCHED)), shape.normal(0, 0.7, (RANK, WATCHED))
    means[FORCED[:4], 0] += 12
    states = np.random.default_rng(seed).integers(0, 4, steps)
    logits = means[states] + noise.normal(size=(steps, RANK)) @ axes
    logits -= np.log(np.exp(logits).sum(1, keepdims=True) + 0.01)
    return logits.astype(np.float16), states


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.fit(*made_up(2000, 1), FORCED)


def reference_kl(p_logits: np.ndarray, q_logits: np.ndarray, temperature: float) -> float:
    """One step's KL as the textbook has it."""
    p, q = (np.exp(np.asarray(x, np.float64) / temperature) for x in (p_logits, q_logits))
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def test_divergence_is_kl_at_each_temperature() -> None:
    rng = np.random.default_rng(3)
    true, decoded = rng.normal(0, 3, (1100, 7)), rng.normal(0, 3, (1100, 7))  # more than one chunk
    found = divergence(true, decoded)
    for row in (0, 1, 1099):
        np.testing.assert_allclose(found[row], [reference_kl(true[row], decoded[row], t) for t in (1, 2, 4)], rtol=1e-9)
    assert divergence(true, true + 5).max() < 1e-12  # a constant is free
    assert divergence(true + 2000, true - 2000).max() < 1e-9


def test_steps_not_used_for_fitting_are_under_the_target(codec: Codec) -> None:
    logprobs, states = made_up(3000, 2)
    decoded = codec.decode(codec.encode(logprobs, states), states)
    choice = ~FORCED[states]
    for temperature, target in TARGET.items():
        errors = [reference_kl(a, b, temperature) for a, b in zip(logprobs[choice], decoded[choice], strict=True)]
        assert target * MARGIN / 20 < np.mean(errors) < target  # under it, and not by wasting bytes
    assert codec.columns < WATCHED


def test_shapes_determinism_and_any_selection_of_steps(codec: Codec) -> None:
    logprobs, states = made_up(2500, 4)  # more than one chunk
    codes = codec.encode(logprobs, states)
    assert codes.shape == (2500, codec.columns)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, codec.encode(logprobs, states))
    refitted = Codec.fit(*made_up(2000, 1), FORCED)
    np.testing.assert_array_equal(refitted.encoder_WP, codec.encoder_WP)
    decoded = codec.decode(codes, states)
    assert decoded.dtype == np.float32
    some = np.random.default_rng(0).permutation(2500)[:77]
    np.testing.assert_allclose(codec.decode(codes[some], states[some]), decoded[some], atol=1e-4)
    assert codec.encode(logprobs[:0], states[:0]).shape == (0, codec.columns)


def plain(components: int, wide: int, step: float) -> Codec:
    """A codec whose components are the first tokens themselves."""
    axes = np.eye(WATCHED, components, dtype=np.float32)
    low = step * axes.T
    means = np.random.default_rng(5).normal(0, 3, (len(FORCED), WATCHED)).astype(np.float32)
    return Codec(means, axes / np.float32(step), np.concatenate([low, 256 * low[:wide]]).astype(np.float32))


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    wide=st.integers(0, WATCHED),
    step=st.floats(0.01, 1),
    spread=st.floats(0, 40),
)
def test_errors_are_at_most_half_a_step_where_unsaturated(seed: int, wide: int, step: float, spread: float) -> None:
    codec = plain(WATCHED, wide, step)
    rng = np.random.default_rng(seed)
    states = rng.integers(0, len(FORCED), 40)
    above = rng.normal(0, spread, (40, WATCHED))
    logprobs = (codec.means_SW[states] + above).astype(np.float32)
    error = np.abs(codec.decode(codec.encode(logprobs, states), states) - logprobs)
    limit = np.where(np.arange(WATCHED) < wide, 32639, 127) * step
    fits = np.abs(above) <= limit
    assert (error[fits] <= step / 2 + 1e-3).all()
    assert (error <= np.maximum(np.abs(above) - limit, step / 2) + 1e-3).all()  # saturation goes to the nearest bound


@pytest.mark.parametrize(
    ("at_choices", "at_forced", "fields"), [(0, 0, COMPACT), (0.15, 0, FLOAT16), (0, 1, FLOAT16), (3, 3, FLOAT16)]
)
def test_steps_that_the_codec_errs_on_too_much_are_written_as_float16(
    codec: Codec, at_choices: float, at_forced: float, fields: list[pa.Field]
) -> None:
    """As those of comments unlike all that it was fitted on. A few choices among many forced steps count for themselves."""
    logprobs, states = made_up(2000, 8)
    few = FORCED[states] | (np.arange(2000) < 40)
    logprobs, states = logprobs[few].astype(np.float32), states[few]
    noise = np.random.default_rng(0).normal(size=logprobs.shape)
    logprobs += noise * np.where(FORCED[states], at_forced, at_choices)[:, None]
    counts, automaton = np.array([300, len(states) - 300]), cast(Automaton, SimpleNamespace(forced=FORCED))
    payload = encode(logprobs, np.zeros((len(states), 3), np.float32), counts, states, Compact(codec, automaton))
    assert payload.fields == fields
    if fields == FLOAT16:
        np.testing.assert_array_equal(payload.columns[0].flatten().to_numpy(), logprobs.astype(np.float16).ravel())


def test_every_wide_code_comes_back() -> None:
    codec = plain(1, 1, 1.0)
    units = np.arange(-32639, 32640)
    states = np.zeros(len(units), np.int64)
    logprobs = np.repeat(codec.means_SW[:1], len(units), 0)
    logprobs[:, 0] += units
    decoded = codec.decode(codec.encode(logprobs, states), states)
    np.testing.assert_allclose(decoded[:, 0] - codec.means_SW[0, 0], units, atol=0.01)
    logprobs[:, 0] += np.sign(units) * 32639
    decoded = codec.decode(codec.encode(logprobs, states), states)
    np.testing.assert_allclose(decoded[:, 0] - codec.means_SW[0, 0], 32639 * np.sign(units), atol=0.01)


def test_components_wider_than_a_byte_are_fitted_two_columns() -> None:
    logprobs, states = made_up(2000, 1)
    logprobs[:, -1] += np.random.default_rng(0).normal(0, 80, 2000).astype(np.float16)
    codec = Codec.fit(logprobs, states, FORCED)
    assert codec.columns > codec.components
    units = (logprobs - codec.decode(codec.encode(logprobs, states), states)).astype(np.float64) @ codec.encoder_WP
    assert np.abs(units).max() <= 0.5 + 0.01


def test_half_a_step_holds_along_fitted_components(codec: Codec) -> None:
    logprobs, states = made_up(400, 6)
    decoded = codec.decode(codec.encode(logprobs, states), states)
    units = (logprobs.astype(np.float64) - decoded) @ codec.encoder_WP
    assert np.abs(units).max() <= 0.5 + 0.01


def test_states_never_seen_use_the_mean_of_all_and_stay_close(codec: Codec) -> None:
    logprobs, states = made_up(400, 7)
    unseen = np.full_like(states, 4)
    np.testing.assert_allclose(codec.means_SW[4], made_up(2000, 1)[0].astype(np.float64).mean(0), atol=1e-4)
    error = divergence(logprobs, codec.decode(codec.encode(logprobs, unseen), unseen))
    nothing = divergence(logprobs, codec.means_SW[unseen])
    assert (error.mean(0) < 0.05 * nothing.mean(0)).all()


def test_constant_inputs_give_themselves_back() -> None:
    logprobs = np.full((80, WATCHED), -3.25, np.float16)
    states = np.zeros(80, np.int64)
    for forced in (True, False):
        codec = Codec.fit(logprobs, states, np.array([forced]))
        np.testing.assert_allclose(codec.decode(codec.encode(logprobs, states), states), -3.25, atol=1e-5)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65504, -65504, 3e38, -3e38])
def test_extreme_values_decode_to_finite_ones(codec: Codec, value: float) -> None:
    logprobs, states = made_up(8, 8)
    logprobs = logprobs.astype(np.float32)
    logprobs[:, 3] = value
    assert np.isfinite(codec.decode(codec.encode(logprobs, states), states)).all()
    assert np.isfinite(codec.decode(np.full((1, codec.columns), -128, np.int8), np.zeros(1, np.int64))).all()


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Codec.fit(*made_up(3, 0), FORCED)


def test_save_and_load(codec: Codec, tmp_path: Path) -> None:
    path = str(tmp_path / "codec.safetensors")
    codec.save(path)
    loaded = Codec.load(path)
    for name in ("means_SW", "encoder_WP", "decoder_CW"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(codec, name))
    assert loaded.columns == codec.columns


errors = st.lists(st.tuples(*[st.sampled_from([0.0, 1e-9, 1e-5, 3e-4, 0.02, 1.0, 7.5, 5e3])] * 3), min_size=1, max_size=30)


@settings(max_examples=50)
@given(parts=st.lists(errors, min_size=1, max_size=4))
def test_summaries_merge_to_that_of_the_whole(parts: list[list[tuple[float, ...]]]) -> None:
    merged = ErrorSummary.of(np.zeros((0, 3)))
    for part in parts:
        summary = ErrorSummary.of(np.array(part))
        merged = merged.merge(ErrorSummary.from_json(json.loads(json.dumps(summary.to_json()))))
    everything = np.concatenate([np.array(part) for part in parts])
    whole = ErrorSummary.of(everything)
    assert merged.steps == len(everything)
    np.testing.assert_array_equal(merged.counts_KB, whole.counts_KB)
    np.testing.assert_allclose(merged.mean(), everything.mean(0), rtol=1e-9)
    np.testing.assert_array_equal(merged.percentile(99.9), whole.percentile(99.9))


@pytest.mark.parametrize("q", [1, 50, 99, 99.9, 100])
def test_percentiles_are_within_a_bin_of_the_true_ones(q: float) -> None:
    values = 10 ** np.random.default_rng(9).uniform(-7, 1, (5000, 3))
    found = ErrorSummary.of(values).percentile(q)
    true = np.percentile(values, q, axis=0, method="inverted_cdf")
    assert ((found >= true * (1 - 1e-9)) & (found <= true * 1.1221)).all()


def test_a_summary_of_nothing() -> None:
    empty = ErrorSummary.of(np.zeros((0, 3)))
    np.testing.assert_array_equal(empty.mean(), 0)
    assert empty.to_json()["counts"] == [{}, {}, {}]


def test_log_sum_exps_keep_probabilities_and_logits() -> None:
    rng = np.random.default_rng(10)
    logits = rng.normal(0, 4, (500, 3000)) + rng.uniform(-100, 100, (500, 1))
    lse = np.stack([np.log(np.exp(logits / t).sum(1)) for t in (1, 2, 4)], 1).astype(np.float32)
    packed = pack_lse(lse)
    restored = unpack_lse(packed)
    assert packed.dtype == np.int16
    assert restored.dtype == np.float32
    assert np.abs(restored[:, 0] - lse[:, 0]).max() <= 1 / 128 + 1e-4
    for k, t in ((1, 2), (2, 4)):
        beyond = [x[:, k] - x[:, 0].astype(np.float64) / t for x in (lse, restored)]
        assert np.abs(beyond[0] - beyond[1]).max() <= 1 / 4096 + 1e-4
    assert np.isfinite(unpack_lse(pack_lse(np.full((1, 3), 1e9, np.float32)))).all()
