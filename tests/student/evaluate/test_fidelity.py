from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.shards.manifest import Shards
from student.data.examples import open_examples
from student.data.unpack import TRAIN
from student.evaluate.fidelity import agreement, calibration, close_answers, step_measures, step_sums
from student.model.model import Student
from tests.tiny import tiny_task


def test_agreement_counts_invalid_answers_as_wrong() -> None:
    teacher = [("good", True), ("bad", True), ("bad", False), ("mixed", False)]
    other = [("good", True), ("bad", False), None, ("good", True)]
    result = agreement(tiny_task(), teacher, other)
    assert result == {"valid": 0.75, "whole": 0.25, "fields": {"mood": 0.5, "loud": 0.25}}


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55, 1.0])
    right = np.array([1.0, 0.0, 1.0, 1.0, 1.0])
    # bin 0.9-1: mean confidence 2.9/3, accuracy 2/3, three of five; bin 0.5-0.6: 0.55 against 1, two of five
    expected = 3 / 5 * abs(2.9 / 3 - 2 / 3) + 2 / 5 * abs(0.55 - 1)
    result = calibration(confidence, right)
    assert result["ece"] == pytest.approx(expected)
    assert [b["count"] for b in result["bins"]] == [2, 3]


def test_a_sure_and_right_student_is_calibrated() -> None:
    assert calibration(np.ones(10), np.ones(10))["ece"] == 0
    assert calibration(np.zeros(0), np.zeros(0)) == {"ece": 0.0, "bins": []}


@torch.inference_mode()
def test_step_measures_against_float64(model: Student, shards: Shards) -> None:
    examples = open_examples(shards, TRAIN, "full")
    batch = examples.batch(np.arange(20))
    parts = [examples.batch(np.arange(3))], [examples.batch(np.arange(3, 7)), examples.batch(np.arange(7, 20))]
    result = step_measures(sum(step_sums(model, part) for part in parts))
    student = model(batch.tokens, batch.predict).double().log_softmax(-1)
    teacher = batch.teacher.double().log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    right = student.argmax(-1) == batch.targets
    assert result["steps"] == len(batch.targets)
    assert result["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert result["choice_kl"] == pytest.approx(kl[batch.choice].mean().item(), rel=1e-5)
    assert result["accuracy"] == pytest.approx(right.double().mean().item())
    assert result["choice_accuracy"] == pytest.approx(right[batch.choice].double().mean().item())


@pytest.mark.parametrize("sequence", ["full", "choices"])
def test_close_answers_by_hand(shards: Shards, sequence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, allowed = open_examples(shards, TRAIN, sequence), shards.compiled.automaton.allowed
    least = []
    for i in range(30):
        one = examples.batch(np.array([i]))
        margins = []
        for row, state, choice in zip(one.teacher.tolist(), one.state.tolist(), one.choice.tolist(), strict=True):
            *_, second, first = sorted(row[column] for column in np.flatnonzero(allowed[state])) if choice else (0.0, np.inf)
            margins.append(first - second)
        least.append(min(margins))
    monkeypatch.setattr("student.evaluate.fidelity.CLOSE", float(np.mean(sorted(least)[9:11])))  # made up, they are wide apart
    found = close_answers(shards.compiled, [examples.batch(np.arange(11)), examples.batch(np.arange(11, 30))])
    assert found == 10


@torch.inference_mode()
def test_the_tail_is_left_out_of_step_measures(model: Student, shards: Shards) -> None:
    examples, W = open_examples(shards, TRAIN, "full"), shards.compiled.watched.size
    torch.manual_seed(1)
    tailed = Student(replace(model.shape, output_vocabulary=W + 1), model.rows.numpy()).eval()
    wide = torch.cat([model.head.weight, 50 * torch.randn(1, model.shape.width)])
    tailed.load_state_dict(model.state_dict() | {"head.weight": wide})
    expected, found = (step_measures(step_sums(student, [examples.batch(np.arange(20))])) for student in (model, tailed))
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    assert found["choice_accuracy"] == expected["choice_accuracy"]
    assert found["calibration"]["ece"] == pytest.approx(expected["calibration"]["ece"], rel=1e-4)
