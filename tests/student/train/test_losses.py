"""What is left beside `tests/numerics/test_objectives.py`: how a training comes by its loss."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shards.manifest import Shards
from student.config import TrainConfig
from student.data.examples import columns_of, open_examples
from student.data.unpack import TRAIN
from student.train.loop import token_weights
from student.train.losses import OBJECTIVES, Loss


def test_every_objective_can_be_configured_and_every_configured_one_is_there() -> None:
    assert set(get_args(TrainConfig.model_fields["objective"].annotation)) == set(OBJECTIVES)
    for name in OBJECTIVES:
        Loss(TrainConfig(objective=name))


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "step"])
@given(progress=st.floats(0, 1))
def test_the_curriculums_weights_add_up_to_one_all_along(shape: str, progress: float) -> None:
    weights = Loss(TrainConfig(weights=shape)).weights(progress)
    assert weights["kl"] + weights["ce"] == pytest.approx(1)
    assert 0.9 <= weights["kl"] + 1e-9 <= 0.95 + 2e-9


def test_weights_step_half_way() -> None:
    loss = Loss(TrainConfig(weights="step"))
    assert loss.weights(0.49) == pytest.approx({"kl": 0.95, "ce": 0.05})
    assert loss.weights(0.5) == pytest.approx({"kl": 0.9, "ce": 0.1})


def chosen_counts(shards: Shards) -> np.ndarray:
    """How often the teacher chose each watched token in the training split, one answer at a time."""
    examples, automaton = open_examples(shards, TRAIN, "full"), shards.compiled.automaton
    counts = np.zeros(shards.compiled.watched.size)
    for i in range(len(examples)):
        answer = examples.answer(i)
        for state, token in zip(automaton.walk(answer), answer, strict=False):
            if automaton.allowed[state].sum() > 1:
                counts[columns_of(shards.compiled, np.array([token]))] += 1
    return counts


@pytest.mark.parametrize("balance", [0.5, 1.0])
@pytest.mark.parametrize("sequence", ["full", "choices"])
def test_token_weights_are_a_power_of_inverse_frequency_with_a_mean_of_one(
    shards: Shards, balance: float, sequence: str
) -> None:
    counts = chosen_counts(shards)
    weights = token_weights(open_examples(shards, TRAIN, sequence), balance, torch.device("cpu"))
    assert weights is not None
    found, seen = weights.double().numpy(), counts > 0
    assert (found[~seen] == 1).all()
    assert (found * counts).sum() / counts.sum() == pytest.approx(1)
    scaled = found[seen] * counts[seen] ** balance
    np.testing.assert_allclose(scaled, scaled[0], rtol=1e-5)


def test_tokens_weigh_alike_without_balance(shards: Shards) -> None:
    assert token_weights(open_examples(shards, TRAIN, "full"), 0.0, torch.device("cpu")) is None
