"""Fields that an answer may leave out, from a student: valid by construction, and how likely it leaves one out."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.task.compiled import CompiledTask
from student.decode import value_probabilities as module
from student.decode.decode import Decoder
from tests.student.decode.test_decode import SEQUENCES, make_student, prefixes, recompiled
from tests.student.decode.test_value_probabilities import shares_reference
from tests.tiny import tiny_task

FIELDS = {"mood": ["good", "goods", None], "loud": [True, False, None], "sure": ["good", None]}
optional = st.sampled_from([list(names) for n in (1, 2) for names in itertools.combinations(FIELDS, n)])


@pytest.mark.parametrize("sequence", SEQUENCES)
@settings(max_examples=8, deadline=None)
@given(names=optional, nesting=st.sampled_from([None, "."]), seed=st.integers(0, 10_000))
def test_untrained_students_leave_out_what_they_may(
    compiled: CompiledTask, sequence: str, names: list[str], nesting: str | None, seed: int
) -> None:
    inside = "" if nesting is None else "a."
    fields = {inside + name: values for name, values in FIELDS.items()}
    written = {"optional": [inside + name for name in names], "format": {"nesting": nesting}}
    task = recompiled(compiled, tiny_task(fields=fields, context=None, **written))
    decoded = Decoder(make_student(task, seed, 6.0, sequence=sequence), task).constrained(prefixes(task, 4), True)
    assert decoded.value_probabilities is not None
    for row, tokens in enumerate(decoded.tokens):
        text = task.tokenizer.decode(tokens)
        values = task.task.parse(text)
        assert values is not None
        answer = json.loads(text) if nesting is None else json.loads(text)["a"]
        there = {name for name, value in zip(FIELDS, values, strict=True) if value is not None or name not in names}
        assert answer.keys() == there
        for shares in decoded.value_probabilities.values():
            assert shares[row].sum() == pytest.approx(1)


@pytest.mark.parametrize("names", [["mood"], ["loud"], ["loud", "sure"]])
@pytest.mark.parametrize("likely", [1e-12, module.LIKELY])
@torch.inference_mode()
def test_the_share_of_null_is_that_of_answers_without_the_field(
    compiled: CompiledTask, monkeypatch: pytest.MonkeyPatch, names: list[str], likely: float
) -> None:
    monkeypatch.setattr(module, "LIKELY", likely)
    task = recompiled(compiled, tiny_task(fields=FIELDS, optional=names, context=None))
    left_out = set()
    for seed in range(4):
        model, given_ = make_student(task, seed, 20.0, sequence="choices"), prefixes(task, 4)
        decoded = Decoder(model, task).constrained(given_, value_probabilities=True)
        assert decoded.value_probabilities is not None
        for row, (prefix, tokens) in enumerate(zip(given_, decoded.tokens, strict=True)):
            values = task.task.written(task.tokenizer.decode(tokens)) or ()
            for shares, name in zip(shares_reference(model, task, prefix, tuple(map(repr, values))), FIELDS, strict=True):
                expected = [shares.get(repr(other), 0.0) for other in FIELDS[name]]
                assert decoded.value_probabilities[name][row] == pytest.approx(expected, abs=0.05 if likely > 1e-6 else 1e-5)
            left_out.add(values[-1] is None)
    assert left_out == {True, False}
