from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.shards.manifest import Shards
from student.config import TrainConfig
from student.data.examples import Batch, Examples, columns_of, open_examples
from student.data.unpack import TRAIN
from student.decode.decode import Decoder
from student.model.model import Student
from student.train.loop import token_weights
from student.train.losses import Loss
from student.train.order import Order
from student.train.strategy import make_strategy
from student.train.trainer import Sums, Trainer, means

CONFIG = TrainConfig(epochs=8, batch_size=16, learning_rate=3e-3)
CPU = torch.device("cpu")


@pytest.fixture
def examples(shards: Shards) -> Examples:
    return open_examples(shards, TRAIN, "full")


def make_trainer(model: Student, config: TrainConfig = CONFIG, steps: int = 60, loss: Loss | None = None) -> Trainer:
    return Trainer(make_strategy(model, config, CPU), config, model.shape, steps, CPU, loss)


def run_steps(model: Student, examples: Examples, steps: int, **changes: Any) -> list[float]:
    config = CONFIG.model_copy(update=changes)
    trainer, order, losses = make_trainer(model, config), Order(examples.lengths, config), []
    batches: Iterator[Any] = (indices for epoch in range(1, 9) for indices in order.epoch(epoch))
    for _, indices in zip(range(steps), batches, strict=False):
        sums = Sums()
        trainer.step([examples.batch(indices)], examples.weight(indices, config.forced_weight), sums)
        losses.append(means(sums.totals())["loss"])
    return losses


def weights_of(model: Student) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_the_share_of_right_answers_is_that_of_decoding(model: Student, examples: Examples) -> None:
    run_steps(model, examples, 80, learning_rate=2e-2)  # enough to give allowed tokens alone, too few to be always right
    decoded = Decoder(model.eval(), examples.compiled).constrained([examples.prefix(i) for i in range(len(examples))])
    same = [tokens == examples.answer(i).tolist() for i, tokens in enumerate(decoded.tokens)]
    measured = make_trainer(model).measure(examples.batch(part) for part in np.array_split(np.arange(len(examples)), 3))
    assert 0.1 < measured["answer_accuracy"] < 0.9
    assert measured["answer_accuracy"] == pytest.approx(np.mean(same))


def test_training_learns(model: Student, examples: Examples) -> None:
    losses = run_steps(model, examples, 60)
    assert losses[-1] < 0.4 * losses[0]


def test_same_seed_same_weights(model: Student, examples: Examples) -> None:
    model = Student(dataclasses.replace(model.shape, dropout=0.1), model.rows.numpy())
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    assert run_steps(model, examples, 5) == run_steps(twin, examples, 5)
    assert equal(weights_of(model), weights_of(twin))
    run_steps(other, examples, 5, seed=1)
    assert not equal(weights_of(model), weights_of(other))


def test_a_step_draws_by_its_position_and_not_by_what_was_drawn_before(model: Student, examples: Examples) -> None:
    model = Student(dataclasses.replace(model.shape, dropout=0.1), model.rows.numpy())
    twin = copy.deepcopy(model)
    run_steps(model, examples, 1)
    torch.rand(7)
    run_steps(twin, examples, 1)
    assert equal(weights_of(model), weights_of(twin))


def test_measuring_changes_nothing_and_does_not_depend_on_batches(model: Student, examples: Examples) -> None:
    model = Student(dataclasses.replace(model.shape, dropout=0.5), model.rows.numpy())
    trainer, before, order = make_trainer(model), weights_of(model), np.arange(30)
    one = trainer.measure([examples.batch(order)])
    three = trainer.measure(examples.batch(part) for part in np.split(order, [3, 11]))
    assert one == pytest.approx(three, rel=1e-5)
    assert equal(before, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_measure_weighs_forced_steps_as_it_is_told(model: Student, examples: Examples) -> None:
    batch = examples.batch(np.arange(30))
    with torch.no_grad():
        losses = F.cross_entropy(model(batch.tokens, batch.predict).double(), batch.targets, reduction="none")
    for weight in (0.0, 0.3, 1.0):
        changes = {"forced_weight": weight, "objective": "hard-label"}
        measured = make_trainer(model, CONFIG.model_copy(update=changes)).measure([batch])["loss"]
        weights = torch.where(batch.choice, 1.0, weight).double()
        assert measured == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)
        assert examples.weight(np.arange(30), weight) == pytest.approx(float(weights.sum()))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_step_weighs_forced_steps_as_it_is_told(model: Student, examples: Examples, weight: float) -> None:
    """Against float64 gradients: without a weight, forced steps might say anything."""
    batch, config = examples.batch(np.arange(8)), CONFIG.model_copy(update={"forced_weight": weight, "objective": "hard-label"})
    twin = copy.deepcopy(model).double()
    losses = F.cross_entropy(twin(batch.tokens, batch.predict), batch.targets, reduction="none")
    weights = torch.where(batch.choice, 1.0, weight).double()
    ((losses * weights).sum() / weights.sum()).backward()
    expected = torch.stack([parameter.grad.norm() for parameter in twin.parameters() if parameter.grad is not None]).norm()
    norm = make_trainer(model, config).step([batch], examples.weight(np.arange(8), weight), Sums())
    assert float(norm) == pytest.approx(float(expected), rel=1e-3)  # RMSNorm's epsilon is the type's


def test_each_term_pulls_with_a_finite_force(model: Student, examples: Examples) -> None:
    batch = examples.batch(np.arange(8))
    forces = make_trainer(model).term_gradients(batch)
    assert set(forces) == {"kl_gradient", "ce_gradient"}
    assert all(math.isfinite(force) and force > 1e-3 for force in forces.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_student_equal_to_its_teacher_feels_no_pull_of_the_divergence(model: Student, examples: Examples) -> None:
    batch = examples.batch(np.arange(8))
    trainer = make_trainer(model)
    with torch.no_grad():
        logits_MW = trainer._logits(batch)
    twin = Batch(**{**vars(batch), "teacher": logits_MW.log_softmax(-1)})
    forces = trainer.term_gradients(twin)
    assert forces["kl_gradient"] < 1e-7
    assert forces["ce_gradient"] > 1e-3


def test_balanced_weights_of_tokens_have_a_mean_of_one_over_the_choices(examples: Examples) -> None:
    assert token_weights(examples, 0.0, CPU) is None
    automaton = examples.compiled.automaton
    chosen = examples.columns["answer"][~automaton.forced[examples.columns["state"]]]
    columns = columns_of(examples.compiled, chosen)
    counts = np.bincount(columns, minlength=examples.compiled.watched.size)
    for balance in (0.5, 1.0):
        weights = token_weights(examples, balance, CPU)
        assert weights is not None
        assert weights.shape == (examples.compiled.watched.size,)
        assert weights[columns].double().mean() == pytest.approx(1, rel=1e-6)
        assert (weights[counts == 0] == 1).all()
        shares = weights.numpy()[counts > 0] * counts[counts > 0] ** balance
        np.testing.assert_allclose(shares, shares[0], rtol=1e-5)  # a power of the inverse frequency
        assert len(set(counts[counts > 0])) > 1
