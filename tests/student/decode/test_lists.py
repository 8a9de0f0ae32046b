"""Lists of labels from a student: valid by construction, and how likely each label is to be in them."""

from __future__ import annotations

import ast

import numpy as np
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

FIELDS = {"loud": [True, False], "tags": ["good", "goods", "bad", None, True], "sure": [True, None]}
rules = st.fixed_dictionaries(
    {"min": st.integers(0, 2), "max": st.sampled_from([None, 2, 3]), "order": st.sampled_from(["listed", "any"])}
)


@pytest.mark.parametrize("sequence", SEQUENCES)
@settings(max_examples=8, deadline=None)
@given(rule=rules, nesting=st.sampled_from([None, "."]), seed=st.integers(0, 10_000))
def test_untrained_students_write_lists_of_the_rule(
    compiled: CompiledTask, sequence: str, rule: dict[str, object], nesting: str | None, seed: int
) -> None:
    fields = {name if nesting is None else f"a.{name}": values for name, values in FIELDS.items()}
    name = list(fields)[1]
    task = recompiled(compiled, tiny_task(fields=fields, lists={name: rule}, format={"nesting": nesting}, context=None))
    decoded = Decoder(make_student(task, seed, 6.0, sequence=sequence), task).constrained(prefixes(task, 4), True)
    for row, tokens in enumerate(decoded.tokens):
        answer = task.task.parse(task.tokenizer.decode(tokens))
        assert answer is not None
        assert decoded.value_probabilities is not None
        shares = decoded.value_probabilities[name][row]
        assert ((shares >= 0) & (shares <= 1 + 1e-9)).all()
        least, most = task.task.lists[name].min, task.task.lists[name].most(5)
        assert least - 1e-9 <= shares.sum() <= most + 1e-9


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("rule", [{}, {"min": 1, "max": 2, "order": "any"}], ids=["all", "two in any order"])
@pytest.mark.parametrize("likely", [1e-12, module.LIKELY])
@torch.inference_mode()
def test_the_share_of_a_label_is_that_of_the_lists_with_it(
    compiled: CompiledTask, monkeypatch: pytest.MonkeyPatch, sequence: str, rule: dict[str, object], likely: float
) -> None:
    monkeypatch.setattr(module, "LIKELY", likely)
    task = recompiled(compiled, tiny_task(fields=FIELDS, lists={"tags": rule}, context=None))
    model, given_ = make_student(task, 3, 20.0, sequence=sequence), prefixes(task, 3)
    decoded = Decoder(model, task).constrained(given_, value_probabilities=True)
    assert decoded.value_probabilities is not None
    for row, (prefix, tokens) in enumerate(zip(given_, decoded.tokens, strict=True)):
        chosen = tuple(map(repr, task.task.written(task.tokenizer.decode(tokens)) or ()))
        of_lists = {ast.literal_eval(some): share for some, share in shares_reference(model, task, prefix, chosen)[1].items()}
        expected = [
            sum(share for some, share in of_lists.items() if any(repr(label) == repr(other) for other in some))
            for label in FIELDS["tags"]
        ]
        assert decoded.value_probabilities["tags"][row] == pytest.approx(
            expected, abs=0.05 if likely == module.LIKELY else 1e-6
        )


def test_a_list_costs_a_call_for_each_of_its_labels_at_most(compiled: CompiledTask) -> None:
    task = recompiled(compiled, tiny_task(fields=FIELDS, lists={"tags": {"max": 2}}, context=None))
    model, given_ = make_student(task, 1, sequence="choices"), prefixes(task, 6)
    plain, asked = (Decoder(model, task).constrained(given_, value_probabilities=shares).calls for shares in (False, True))
    assert plain < asked <= plain + 8
    assert np.isfinite(asked)


def test_a_value_that_another_one_implies_has_all_of_its_share(compiled: CompiledTask) -> None:
    pairs = [["good", 1], ["bad", None], ["bad", True]]
    fields = {"a": ["good", "bad"], "b": [1, None, True]}
    task = recompiled(compiled, tiny_task(fields=fields, combinations=[{"fields": ["a", "b"], "values": pairs}], context=None))
    decoded = Decoder(make_student(task, 5, 20.0, sequence="choices"), task).constrained(prefixes(task, 12), True)
    assert decoded.value_probabilities is not None
    seen = set()
    for row, tokens in enumerate(decoded.tokens):
        values = task.task.parse(task.tokenizer.decode(tokens))
        assert values is not None
        seen.add(values[0])
        shares = decoded.value_probabilities["b"][row]
        assert shares.tolist() == [1, 0, 0] if values[0] == "good" else (shares[0] == 0 and shares.sum() == pytest.approx(1))
    assert seen == {"good", "bad"}
