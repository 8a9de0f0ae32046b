"""Fields, their trees and the value_probabilities of their values, against a plain walk through every answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Values
from student.decode.choices import NONE, Choices
from student.decode.decode import Decoder
from student.decode.fields import Fields
from student.model.model import Student
from tests.student.decode.test_decode import SEQUENCES, make_student, prefixes, recompiled
from tests.tiny import tiny_task

BRANCHY = {
    "kind": ["good", "goodness", "goods", "bad", None],
    "one": ["only"],
    "count": [1, 10, 100, True, "1"],
    "loud": [True, False],
}


@pytest.fixture(scope="module")
def branchy(compiled: CompiledTask) -> CompiledTask:
    """A task whose values share their first tokens, and one with a single value."""
    return recompiled(compiled, tiny_task(fields=BRANCHY))


def paths(compiled: CompiledTask) -> dict[Values, list[tuple[int, int]]]:
    """Of every answer its choices, as state and column."""
    automaton, found = compiled.automaton, {}
    answers = list(compiled.task.answers())
    for values, ids in zip(answers, compiled.tokenizer.encode([compiled.task.render(v) for v in answers]), strict=True):
        tokens = [*ids, compiled.tokenizer.end_id]
        steps = zip(automaton.walk(tokens), tokens, strict=False)
        found[tuple(map(repr, values))] = [(s, automaton.column[t]) for s, t in steps if not automaton.forced[s]]
    return found


def test_a_trail_spells_its_answer_and_none_is_longer_than_the_most(branchy: CompiledTask) -> None:
    choices = Choices(branchy, forced_read=True)
    found = paths(branchy)
    assert choices.most == max(map(len, found.values()))
    for values, ids in zip(
        found, branchy.tokenizer.encode([branchy.task.render(v) for v in branchy.task.answers()]), strict=True
    ):
        trail = np.full(choices.most, NONE, np.int32)
        trail[: len(found[values])] = [column for _, column in found[values]]
        assert choices.spell(trail) == [*ids, branchy.tokenizer.end_id]


def test_every_choice_decides_the_first_field_in_which_answers_still_differ(branchy: CompiledTask) -> None:
    fields, found = Fields(branchy, Choices(branchy, forced_read=False)), paths(branchy)
    seen = set()
    for values, path in found.items():
        for i, (state, _) in enumerate(path):
            alike = [other for other, way in found.items() if way[:i] == path[:i]]
            first = next(f for f in range(len(values)) if len({other[f] for other in alike}) > 1)
            assert fields.by_state[state] == first
            seen.add(state)
    assert {int(s) for s in np.flatnonzero(fields.by_state >= 0)} == seen
    assert len(seen) > 6


def shares_reference(
    model: Student, compiled: CompiledTask, prefix: np.ndarray, chosen: tuple[str, ...]
) -> list[dict[str, float]]:
    """By field, each value's probability given the values before it: every answer alone, whole sequences, no cache."""
    automaton, choices_only = compiled.automaton, model.shape.sequence == "choices"
    answers = list(compiled.task.answers())
    probability = {}
    for values, ids in zip(answers, compiled.tokenizer.encode([compiled.task.render(v) for v in answers]), strict=True):
        read, product = prefix.tolist(), 1.0
        for state, token in zip(automaton.walk(tokens := [*ids, compiled.tokenizer.end_id]), tokens, strict=False):
            if automaton.forced[state]:
                read += [] if choices_only else [token]
                continue
            logits = model(torch.tensor([read]))[0, -1, : len(automaton.tokens)].double()
            allowed = torch.tensor(automaton.allowed[state])
            product *= float(logits.masked_fill(~allowed, -torch.inf).softmax(-1)[automaton.column[token]])
            read.append(token)
        probability[tuple(map(repr, values))] = product
    found = []
    for field in range(len(chosen)):
        inside = {v: p for v, p in probability.items() if v[:field] == chosen[:field]}
        total = sum(inside.values())
        by_value: dict[str, float] = {}
        for values, p in inside.items():
            by_value[values[field]] = by_value.get(values[field], 0.0) + p / total
        found.append(by_value)
    return found


@pytest.mark.parametrize("sequence", SEQUENCES)
@settings(max_examples=3)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1.0, 6.0]))
@torch.inference_mode()
def test_shares_are_the_conditional_probabilities_of_all_values(
    branchy: CompiledTask, sequence: str, seed: int, scale: float
) -> None:
    model, given = make_student(branchy, seed, scale, sequence=sequence), prefixes(branchy, 3)
    plain, decoded = (Decoder(model, branchy).constrained(given, value_probabilities=asked) for asked in (False, True))
    assert decoded.tokens == plain.tokens
    assert decoded.confidence == pytest.approx(plain.confidence)
    assert decoded.value_probabilities is not None
    for row, (prefix, tokens) in enumerate(zip(given, decoded.tokens, strict=True)):
        chosen = tuple(map(repr, branchy.task.parse(branchy.tokenizer.decode(tokens)) or ()))
        reference = shares_reference(model, branchy, prefix, chosen)
        product = 1.0
        for (name, values), expected, value in zip(branchy.task.fields.items(), reference, chosen, strict=True):
            found = dict(zip(map(repr, values), decoded.value_probabilities[name][row], strict=True))
            assert found == pytest.approx(expected, abs=2e-4)
            product *= found[value]
        assert product == pytest.approx(decoded.confidence[row], rel=1e-3)


def test_a_temperature_flattens_its_field_alone_and_changes_no_answer(branchy: CompiledTask) -> None:
    model, given = make_student(branchy, 5, 6.0, sequence="choices"), prefixes(branchy, 5)
    plain = Decoder(model, branchy).constrained(given, value_probabilities=True)
    flat = Decoder(model, branchy, {"count": 50.0}).constrained(given, value_probabilities=True)
    assert flat.tokens == plain.tokens
    assert plain.value_probabilities is not None
    assert flat.value_probabilities is not None
    np.testing.assert_allclose(flat.value_probabilities["kind"], plain.value_probabilities["kind"])
    assert flat.value_probabilities["count"].max() < plain.value_probabilities["count"].max()
    assert (flat.confidence < plain.confidence).all()


def test_shares_cost_few_calls_more(branchy: CompiledTask) -> None:
    model, given = make_student(branchy, 1, sequence="choices"), prefixes(branchy, 6)
    plain, asked = (
        Decoder(model, branchy).constrained(given, value_probabilities=value_probabilities).calls
        for value_probabilities in (False, True)
    )
    assert plain < asked <= plain + len(BRANCHY) * 2
