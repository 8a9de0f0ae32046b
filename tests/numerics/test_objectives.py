from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.base.errors import UserError
from pipeline.teacher.capture import TEMPERATURES
from student.config import TrainConfig
from student.train import losses
from student.train.losses import LEAST_TAIL, OBJECTIVES, SLIM_CLIP, Loss, forward_kl, reverse_kl, slim, teacher_classes, top_kl
from tests.numerics import reference
from tests.numerics.reference import Reference, dense_classes

V, W, M = 50, 12, 5
DIVERGENCES = sorted(set(OBJECTIVES) - {"hard-label"})
SCALES = st.sampled_from([0.1, 1.0, 20.0])
SEEDS = st.integers(0, 2**32 - 1)


def logsumexp(values: NDArray[Any]) -> NDArray[Any]:
    return np.logaddexp.reduce(values, -1)


def full_vocabulary(rng: np.random.Generator, scale: float, balanced: bool = True) -> NDArray[np.float64]:
    """Raw logits [M, V], the first W watched; balanced, a good part of the mass lies outside W, as float32 can tell it."""
    full = scale * rng.normal(size=(M, V))
    if balanced:
        gap = logsumexp(full[:, :W]) - logsumexp(full[:, W:]) + rng.uniform(-2, 2, M)
        full[:, W:] += gap[:, None]
    return full


def stored(full: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor]:
    """What shards hold of raw logits, as the loss is given it: log-probabilities [M, W] and log-sum-exps [M, K]."""
    lse = np.stack([logsumexp(full / t) for t in TEMPERATURES], -1)
    return torch.tensor(full[:, :W] - lse[:, :1], dtype=torch.float32), torch.tensor(lse, dtype=torch.float32)


def compare(
    config: TrainConfig, seed: int, scale: float, progress: float, weighted: bool, top: tuple[int, float] = (4, 0.05)
) -> None:
    """The product's loss and gradient against the reference's."""
    rng = np.random.default_rng(seed)
    full, targets = full_vocabulary(rng, scale), rng.integers(W, size=M)
    student = (scale * rng.normal(size=(M, W + config.tail))).astype(np.float32)
    weights = rng.uniform(0.1, 3, W).astype(np.float32) if weighted else None
    kl, ce = (start + (end - start) * progress for start, end in reference.WEIGHTS[config.objective])
    default = 2.0 if config.objective == "temperature" else 1.0
    expected = Reference(
        *(config.objective, full, targets, W, config.temperature or default, config.tail, *top),
        *(config.label_smoothing, weights, kl, ce),
    )
    loss, gradient = expected(student.astype(np.float64))
    logits = torch.tensor(student, requires_grad=True)
    objective = Loss(config, None if weights is None else torch.from_numpy(weights))
    with patch.multiple(losses, TOP_K=top[0], TOP_SHARE=top[1]):
        terms = objective(logits, *stored(full), torch.from_numpy(targets), progress)
    terms.loss.sum().backward()
    assert terms.loss.dtype == torch.float32
    np.testing.assert_allclose(terms.loss.detach(), loss, rtol=1e-4, atol=2e-5 * max(1.0, scale))
    np.testing.assert_allclose(logits.grad, gradient, rtol=1e-4, atol=2e-5 * max(1.0, scale))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@settings(max_examples=25)
@given(seed=SEEDS, scale=SCALES, progress=st.floats(0, 1))
def test_objective_and_gradient_equal_the_float64_reference(name: str, seed: int, scale: float, progress: float) -> None:
    compare(TrainConfig(objective=name), seed, scale, progress, weighted=False)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@settings(max_examples=40)
@given(
    seed=SEEDS,
    scale=SCALES,
    progress=st.floats(0, 1),
    kind=st.one_of(
        st.tuples(st.just(True), st.sampled_from([None, 1.0, 2.0, 4.0])),
        st.tuples(st.just(False), st.sampled_from([None, 0.7, 1.5, 3.0])),
    ),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    weighted=st.booleans(),
    top=st.sampled_from([(1, 0.05), (5, 0.4), (100, 1.0)]),
)
def test_objective_and_gradient_equal_the_reference_under_every_option(
    name: str,
    seed: int,
    scale: float,
    progress: float,
    kind: tuple[bool, float | None],
    smoothing: float,
    weighted: bool,
    top: tuple[int, float],
) -> None:
    options = {"tail": kind[0], "temperature": kind[1], "label_smoothing": smoothing}
    compare(TrainConfig(objective=name, **options), seed, scale, progress, weighted, top)


def test_the_reference_knows_every_objective_and_clips_where_the_product_does() -> None:
    assert set(reference.WEIGHTS) == set(OBJECTIVES) == set(get_args(TrainConfig.model_fields["objective"].annotation))
    assert reference.CLIP == SLIM_CLIP


def divergence(
    name: str, student: torch.Tensor, teacher: torch.Tensor, top_k: int = 100, top_share: float = 0.05, **options: Any
) -> torch.Tensor:
    """The divergence alone, at the temperature and with the factor that the objective has."""
    loss = Loss(TrainConfig(objective=name, **options))
    with patch.multiple(losses, TOP_K=top_k, TOP_SHARE=top_share):
        return loss(student, teacher, None, torch.zeros(len(student), dtype=torch.int64), 0.5).parts["kl"]


@pytest.mark.parametrize("name", ["curriculum", "temperature", "topk", "reverse-kl"])
@settings(max_examples=25)
@given(seed=SEEDS, scale=SCALES, constant=st.floats(-10, 10))
def test_a_student_equal_to_its_teacher_up_to_a_constant_costs_nothing(
    name: str, seed: int, scale: float, constant: float
) -> None:
    teacher = torch.tensor(scale * np.random.default_rng(seed).normal(size=(M, W)), dtype=torch.float32).log_softmax(-1)
    student = (teacher + constant).requires_grad_()
    value = divergence(name, student, teacher, top_k=4)
    value.sum().backward()
    assert value.abs().max() < 1e-4
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-4


@settings(max_examples=25)
@given(seed=SEEDS, scale=SCALES, share=st.sampled_from([0.05, 0.3, 0.99]))
def test_slim_costs_nothing_where_the_student_is_the_truncated_teacher(seed: int, scale: float, share: float) -> None:
    teacher = torch.tensor(scale * np.random.default_rng(seed).normal(size=(M, W)), dtype=torch.float32).log_softmax(-1)
    kept = teacher >= teacher.topk(max(1, int(share * W))).values[:, -1:]
    student = teacher.masked_fill(~kept, -1e4)
    assert divergence("slim", student, teacher, top_share=share).abs().max() < 1e-4
    if share < 0.9 and scale == 1:
        assert divergence("slim", teacher, teacher, top_share=share).min() > 1e-3  # the student is not renormalised


@settings(max_examples=25)
@given(seed=SEEDS, scale=SCALES)
def test_no_divergence_is_negative(seed: int, scale: float) -> None:
    teacher, student = torch.tensor(scale * np.random.default_rng(seed).normal(size=(2, M, W)), dtype=torch.float32)
    for name in DIVERGENCES:
        assert divergence(name, student, teacher, top_k=4).min() > -1e-4


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_the_gradient_carries_t_squared(name: str, temperature: float) -> None:
    rng = np.random.default_rng(0)
    teacher, base = torch.tensor(rng.normal(size=(2, M, W)), dtype=torch.float64)
    hot = (temperature * base).requires_grad_()  # divided by T, it is the student at T = 1
    cool = base.clone().requires_grad_()
    at_t = divergence(name, hot, temperature * teacher.log_softmax(-1), temperature=temperature, top_k=4)
    at_1 = divergence(name, cool, teacher.log_softmax(-1), temperature=1.0, top_k=4)
    at_t.sum().backward()
    at_1.sum().backward()
    torch.testing.assert_close(at_t, temperature**2 * at_1)
    assert hot.grad is not None
    torch.testing.assert_close(hot.grad, temperature * cool.grad)  # T² of the loss, 1 / T of the chain rule


def test_slim_weighs_a_position_without_a_gradient_of_the_weight() -> None:
    teacher = torch.tensor([[0.7, 0.2, 0.1]]).log()
    student = torch.tensor([[0.2, 0.4, 0.4]]).log().requires_grad_()
    with patch.object(losses, "TOP_SHARE", 0.4):
        value = slim(teacher, student.log_softmax(-1))
    value.backward()
    assert value.item() == pytest.approx(3.5 * np.log(1 / 0.2))
    assert student.grad is not None
    np.testing.assert_allclose(student.grad, 3.5 * np.array([[-0.8, 0.4, 0.4]]), rtol=1e-5)


@settings(max_examples=60)
@given(seed=SEEDS, scale=st.sampled_from([0.1, 1.0, 5.0, 20.0]), temperature=st.sampled_from(TEMPERATURES))
def test_the_tail_is_the_mass_outside_the_watched_set(seed: int, scale: float, temperature: int) -> None:
    full = full_vocabulary(np.random.default_rng(seed), scale, balanced=False)
    classes = teacher_classes(*stored(full), temperature)
    assert classes.shape == (M, W + 1)
    np.testing.assert_allclose(classes.exp(), np.exp(dense_classes(full, W, temperature, tail=True)), atol=2e-5)
    np.testing.assert_allclose(classes.exp().sum(-1), 1, atol=1e-6)


@settings(max_examples=30)
@given(seed=SEEDS, scale=SCALES, temperature=st.sampled_from([0.7, 1.0, 2.0, 3.0]))
def test_without_the_tail_the_teacher_is_renormalised_over_the_watched_set(seed: int, scale: float, temperature: float) -> None:
    full = full_vocabulary(np.random.default_rng(seed), scale)
    expected = dense_classes(full, W, temperature, tail=False)
    np.testing.assert_allclose(teacher_classes(stored(full)[0], None, temperature), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.5, 3.0, 8.0])
def test_the_tail_is_refused_where_its_mass_is_not_known(temperature: float) -> None:
    with pytest.raises(UserError, match=r"train\.tail needs a train\.temperature of"):
        Loss(TrainConfig(tail=True, temperature=temperature))


@pytest.mark.parametrize("temperature", [None, *TEMPERATURES])
def test_the_tail_is_taken_where_its_mass_is_known(temperature: float | None) -> None:
    for name in OBJECTIVES:
        Loss(TrainConfig(objective=name, tail=True, temperature=temperature))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_weights_at_both_ends(name: str) -> None:
    kl, ce = reference.WEIGHTS[name]
    loss = Loss(TrainConfig(objective=name))
    for end in (0, 1):
        expected = {"ce": ce[end]} if name == "hard-label" else {"kl": kl[end], "ce": ce[end]}
        assert loss.weights(float(end)) == pytest.approx(expected)


def test_configured_weights_win_over_the_objectives_own_even_where_they_are_zero() -> None:
    loss = Loss(TrainConfig(objective="slim", kl_start=0, kl_end=3, ce_start=2, ce_end=0))
    assert loss.weights(0) == {"kl": 0, "ce": 2}
    assert loss.weights(1) == {"kl": 3, "ce": 0}


def test_parts_and_weights_make_up_the_loss() -> None:
    student, teacher = torch.randn(2, M, W)
    for name in OBJECTIVES:
        terms = Loss(TrainConfig(objective=name))(student, teacher, None, torch.arange(M), 0.3)
        torch.testing.assert_close(terms.loss, sum(terms.weights[part] * value for part, value in terms.parts.items()))
        assert set(terms.parts) == set(terms.weights)


def test_hard_label_ignores_the_teachers_distribution() -> None:
    loss, student, targets = Loss(TrainConfig(objective="hard-label")), torch.randn(M, W), torch.arange(M)
    first, second = (loss(student, torch.randn(M, W), None, targets, 0.9).loss for _ in range(2))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_smoothing_and_token_weights_are_for_training_alone(name: str) -> None:
    student, teacher, targets = torch.randn(M, W), torch.randn(M, W), torch.arange(M)
    plain = Loss(TrainConfig(objective=name))
    fancy = Loss(TrainConfig(objective=name, label_smoothing=0.3), torch.linspace(0.2, 5, W))
    measured = [loss(student, teacher, None, targets, 0.5, training=False) for loss in (plain, fancy)]
    torch.testing.assert_close(measured[1].loss, measured[0].loss)
    torch.testing.assert_close(measured[0].loss, plain(student, teacher, None, targets, 0.5).loss)
    assert not torch.allclose(fancy(student, teacher, None, targets, 0.5).parts["ce"], measured[0].parts["ce"])


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("temperature", [None, 4.0])
def test_tokens_the_teacher_rules_out_and_a_sure_teacher_give_no_nan(name: str, tail: bool, temperature: float | None) -> None:
    teacher = torch.full((3, W), -60000.0, dtype=torch.float16)
    teacher[0, 3], teacher[1, 0], teacher[2, :2] = 0.0, -1e-7, -0.6934  # in the last, rounded to a mass above one
    lse = torch.tensor([[30.0, 15.0, 7.5]]).expand(3, 3)
    for scale in (0.0, 1.0, 100.0, 1e4):
        student = (scale * torch.randn(3, W + tail)).requires_grad_()
        config = TrainConfig(objective=name, tail=tail, temperature=temperature)
        loss = Loss(config)(student, teacher.float(), lse, torch.tensor([3, 0, 1]), 0.5).loss
        loss.sum().backward()
        assert loss.isfinite().all()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_the_least_tail_does_not_outweigh_a_sure_teacher() -> None:
    teacher = torch.tensor([[0.0, -60000.0]])
    classes = teacher_classes(teacher, torch.zeros(1, 3), 1)
    np.testing.assert_allclose(classes.exp(), [[1, 0, LEAST_TAIL]], atol=2e-7)


def test_top_kl_takes_no_more_classes_than_there_are() -> None:
    teacher, student = torch.randn(2, M, W).log_softmax(-1)
    assert losses.TOP_K > W
    torch.testing.assert_close(top_kl(teacher, student), forward_kl(teacher, student))


def test_forward_and_reverse_kl_weigh_by_different_sides() -> None:
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert forward_kl(teacher, student).item() == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
    assert reverse_kl(teacher, student).item() == pytest.approx(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5))


def test_the_reference_gradient_is_that_of_central_differences() -> None:
    """Who checks the checker."""
    rng = np.random.default_rng(1)
    full, student = full_vocabulary(rng, 1.0), rng.normal(size=(M, W + 1))
    made = Reference("reverse-kl", full, rng.integers(W, size=M), W, 2.0, True, 3, 0.3, 0.1, rng.uniform(1, 2, W), 0.7, 0.4)
    for name in OBJECTIVES:
        if name == "slim":
            continue  # its weight is a constant of the gradient
        case = replace(made, objective=name)
        for column in range(W + 1):
            step = 1e-6 * np.eye(W + 1)[column]
            slope = (case(student + step)[0] - case(student - step)[0]) / 2e-6
            np.testing.assert_allclose(case(student)[1][:, column], slope, atol=1e-7)
