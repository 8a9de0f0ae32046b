from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student.losses import OBJECTIVES, cross_entropy, curriculum, hard_label, kl_divergence


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(name: str, student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, a: float) -> tuple[float, np.ndarray]:
    """Sum of the loss over positions and its gradient in the student's logits, float64, from the formulas."""
    log_s, log_t = log_softmax(student), log_softmax(teacher)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    one_hot = np.eye(student.shape[1])[targets]
    kl, ce = (p_t * (log_t - log_s)).sum(), -(one_hot * log_s).sum()
    if name == "hard-label":
        return ce, p_s - one_hot
    return a * kl + (1 - a) * ce, a * (p_s - p_t) + (1 - a) * (p_s - one_hot)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.1, 1.0, 20.0]), a=st.floats(0, 1))
def test_objective_and_gradient_equal_float64_reference(name: str, seed: int, scale: float, a: float) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.normal(size=(2, 5, 7))
    targets = rng.integers(7, size=5)
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    terms = OBJECTIVES[name](logits, torch.tensor(teacher, dtype=torch.float32), torch.tensor(targets), a)
    terms.loss.sum().backward()
    loss, gradient = reference(name, student, teacher, targets, a)
    assert terms.loss.sum().item() == pytest.approx(loss, rel=2e-5, abs=2e-5)
    np.testing.assert_allclose(logits.grad, gradient, atol=2e-6, rtol=2e-5)


def test_kl_is_zero_where_student_equals_teacher_up_to_a_constant() -> None:
    logits = torch.randn(6, 9)
    assert kl_divergence(logits, logits + 3.0).abs().max() < 1e-6


def test_kl_survives_tokens_the_teacher_rules_out() -> None:
    teacher = torch.tensor([[5.0, -60000.0, 0.0]])
    assert torch.isfinite(kl_divergence(teacher, torch.zeros(1, 3))).all()


def test_parts_and_weights_make_up_the_loss() -> None:
    student, teacher, targets = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    terms = curriculum(student, teacher, targets, 0.3)
    total = sum(terms.weights[name] * part for name, part in terms.parts.items())
    torch.testing.assert_close(terms.loss, total)
    assert terms.weights == {"kl": 0.3, "ce": 0.7}


def test_hard_label_ignores_the_teachers_distribution() -> None:
    student, targets = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    a = hard_label(student, torch.randn(4, 6), targets, 0.9).loss
    torch.testing.assert_close(a, cross_entropy(student, targets))
