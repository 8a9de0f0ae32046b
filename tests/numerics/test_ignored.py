"""What is to be ignored changes neither the loss nor a gradient."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.shards.manifest import Shards
from student.config import TrainConfig
from student.data.examples import Batch, Examples, open_examples
from student.data.unpack import TRAIN
from student.model.checkpoint import Tensors
from student.model.model import Student
from student.train.losses import OBJECTIVES
from student.train.strategy import DataParallel
from student.train.trainer import Sums, Trainer


class Watched(DataParallel):
    """Keeps the gradients of its last step."""

    seen: Tensors

    def step(self, rate: float) -> torch.Tensor:
        self.seen = self.gradients()
        return super().step(rate)


def one_step(model: Student, parts: list[Batch], weight: float, **options: Any) -> tuple[float, Tensors]:
    """The loss of one step, summed, and its gradients; on a copy of the model."""
    config = TrainConfig(**options)
    strategy, sums = Watched(copy.deepcopy(model), config), Sums()
    trainer = Trainer(strategy, config, model.shape, 10, torch.device("cpu"))
    trainer.step_index = 3  # every term has a weight
    trainer.step(parts, weight, sums)
    return sums.totals()["loss"], strategy.seen


def assert_same(found: tuple[float, Tensors], expected: tuple[float, Tensors]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert set(found[1]) == set(expected[1])
    assert sum(float(gradient.abs().sum()) for gradient in expected[1].values()) > 0
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def padded(batch: Batch, columns: int, token: int = 0) -> Batch:
    """The same examples with more columns of padding."""
    rows, width = batch.tokens.shape
    tokens = torch.full((rows, width + columns), token)
    tokens[:, :width] = batch.tokens
    return replace(batch, tokens=tokens, predict=batch.predict // width * (width + columns) + batch.predict % width)


def joined(batch: Batch, more: Batch) -> Batch:
    """The examples of both."""
    width = max(batch.tokens.shape[1], more.tokens.shape[1])
    batch, more = padded(batch, width - batch.tokens.shape[1]), padded(more, width - more.tokens.shape[1])
    fields = {name: torch.cat([part, getattr(more, name)]) for name, part in vars(batch).items() if name != "text"}
    return Batch(**fields | {"predict": torch.cat([batch.predict, more.predict + batch.tokens.numel()])})


def weightless(batch: Batch) -> Batch:
    """The same examples, as if nothing in them had been a choice."""
    return replace(batch, choice=torch.zeros_like(batch.choice))


@pytest.fixture
def examples(shards: Shards) -> Examples:
    return open_examples(shards, TRAIN, "full")


@pytest.mark.parametrize("columns", [1, 13, 60])
@pytest.mark.parametrize("token", [0, 17])
def test_padding_is_inert(model: Student, examples: Examples, columns: int, token: int) -> None:
    batch, weight = examples.batch(np.arange(5)), examples.weight(np.arange(5), 1.0)
    assert_same(one_step(model, [padded(batch, columns, token)], weight), one_step(model, [batch], weight))


def test_padding_of_another_examples_length_is_inert(model: Student, examples: Examples) -> None:
    short, long = int(examples.lengths.argmin()), int(examples.lengths.argmax())
    assert examples.lengths[short] < examples.lengths[long]
    indices = np.array([short, long])
    together = one_step(model, [examples.batch(indices)], examples.weight(indices, 1.0))
    apart = one_step(model, [examples.batch(indices[:1]), examples.batch(indices[1:])], examples.weight(indices, 1.0))
    assert_same(together, apart)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_examples_without_weight_are_inert(model: Student, examples: Examples, objective: str) -> None:
    indices, options = np.arange(5), {"objective": objective, "forced_weight": 0.0}
    batch, more = examples.batch(indices), weightless(examples.batch(np.arange(5, 9)))
    weight = examples.weight(indices, 0.0)
    expected = one_step(model, [batch], weight, **options)
    assert_same(one_step(model, [joined(batch, more)], weight, **options), expected)
    assert_same(one_step(model, [joined(more, batch)], weight, **options), expected)
    assert_same(one_step(model, [batch, more], weight, **options), expected)  # as a part of its own


@pytest.mark.parametrize("sequence", ["full", "choices"])
def test_what_the_teacher_says_at_weightless_steps_is_inert(model: Student, shards: Shards, sequence: str) -> None:
    examples = open_examples(shards, TRAIN, sequence)
    batch, weight = examples.batch(np.arange(6)), examples.weight(np.arange(6), 0.0)
    forced = ~batch.choice
    other = replace(
        batch,
        teacher=torch.where(forced[:, None], batch.teacher.flip(1), batch.teacher),
        targets=torch.where(forced, (batch.targets + 1) % 7, batch.targets),
    )
    assert forced.any() == (sequence == "full")
    assert_same(one_step(model, [other], weight, forced_weight=0.0), one_step(model, [batch], weight, forced_weight=0.0))


def test_a_forced_step_that_weighs_is_not_inert(model: Student, examples: Examples) -> None:
    batch, weight = examples.batch(np.arange(5)), examples.weight(np.arange(5), 0.5)
    plain, off = (one_step(model, [batch], weight, forced_weight=share)[0] for share in (0.5, 0.0))
    assert plain > 1.1 * off


def test_the_loss_is_the_weighted_mean_over_positions(model: Student, examples: Examples) -> None:
    """Against the loss of each position alone, by a weight that is summed here."""
    batch, config = examples.batch(np.arange(4)), TrainConfig(objective="hard-label", forced_weight=0.25)
    with torch.no_grad():
        log_s = model(batch.tokens, batch.predict).double().log_softmax(-1)
    ce = -log_s[torch.arange(len(batch.targets)), batch.targets]
    weights = torch.where(batch.choice, 1.0, 0.25).double()
    sums = Sums()
    trainer = Trainer(Watched(copy.deepcopy(model), config), config, model.shape, 10, torch.device("cpu"))
    trainer.step([batch], examples.weight(np.arange(4), 0.25), sums)
    totals = sums.totals()
    assert totals["loss"] == pytest.approx(float((ce * weights).sum()), rel=1e-5)
    assert totals["weight"] == pytest.approx(examples.weight(np.arange(4), 0.25)) == pytest.approx(float(weights.sum()))
