"""One comment alone is answered as it is among others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.task.compiled import CompiledTask
from student.decode.decode import Decoded, Decoder
from student.model.shape import Layer
from tests.student.decode.test_decode import make_student, prefixes, recompiled
from tests.student.decode.test_value_probabilities import BRANCHY
from tests.tiny import tiny_task

WINDOWED = {"family": "gemma3", "kinds": (Layer(window=5), Layer(base=1e6, stretch=8.0)), "key_value_heads": 1}
STUDENTS: dict[str, dict[str, Any]] = {
    "choices": {"sequence": "choices"},
    "full": {"sequence": "full"},
    "windows": WINDOWED | {"sequence": "full"},
    "opening": WINDOWED | {"sequence": "choices", "opening": (7, 8, 9, 10, 11, 12)},
    "wide window": {"sequence": "choices", "kinds": (Layer(window=30), Layer(window=3))},
}
TEMPERATURES = {"kind": 2.0, "count": 0.5}


@pytest.fixture(scope="module")
def branchy(compiled: CompiledTask) -> CompiledTask:
    return recompiled(compiled, tiny_task(fields=BRANCHY))


def equal(one: Decoded, other: Decoded, row: int) -> None:
    assert one.tokens[0] == other.tokens[row]
    assert one.confidence == pytest.approx(other.confidence[row], abs=1e-5)
    assert one.value_probabilities is not None
    assert other.value_probabilities is not None
    for name, value_probabilities in one.value_probabilities.items():
        np.testing.assert_allclose(value_probabilities[0], other.value_probabilities[name][row], atol=1.1e-4)


@pytest.mark.parametrize("kind", STUDENTS)
@torch.inference_mode()
def test_alone_it_is_answered_as_among_others(branchy: CompiledTask, kind: str) -> None:
    answers = set()
    for seed in range(3):
        model, given = make_student(branchy, seed, 6.0, tail=seed == 1, **STUDENTS[kind]), prefixes(branchy, 8)
        decoder = Decoder(model, branchy, TEMPERATURES)
        together = decoder.constrained(given, value_probabilities=True)
        for row, prefix in enumerate(given):
            alone = decoder.constrained([prefix], value_probabilities=True)
            equal(alone, together, row)
            answers.add(tuple(alone.tokens[0]))
    assert len(answers) > 3


@pytest.mark.parametrize("kind", STUDENTS)
@torch.inference_mode()
def test_weights_in_bf16_answer_nearly_the_same(branchy: CompiledTask, kind: str) -> None:
    given = prefixes(branchy, 8)
    whole = Decoder(make_student(branchy, 1, 2.0, **STUDENTS[kind]), branchy).constrained(given, value_probabilities=True)
    halved = Decoder(make_student(branchy, 1, 2.0, **STUDENTS[kind]).halved(), branchy)
    together, alone = (
        halved.constrained(given, value_probabilities=True),
        halved.constrained(given[:1], value_probabilities=True),
    )
    for found in (together, alone):
        assert whole.value_probabilities is not None
        assert found.value_probabilities is not None
        np.testing.assert_allclose(
            found.value_probabilities["kind"], whole.value_probabilities["kind"][: len(found.tokens)], atol=0.05
        )
    assert np.abs(together.confidence - whole.confidence).max() > 0  # it is another precision


def test_one_answer_alone_still_costs_no_call(compiled: CompiledTask) -> None:
    single = recompiled(compiled, tiny_task(fields={"mood": ["good"]}))
    decoded = Decoder(make_student(single, sequence="choices"), single).constrained(
        prefixes(single, 1), value_probabilities=True
    )
    assert decoded.calls == 0
    assert decoded.value_probabilities is not None
    assert decoded.value_probabilities["mood"].tolist() == [[1.0]]
