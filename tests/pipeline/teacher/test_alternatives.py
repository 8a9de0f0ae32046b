"""Values' probabilities from listed alternatives, against a model whose probabilities of whole answers are known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.task.task import Task
from pipeline.task.values import Values
from pipeline.teacher.alternatives import Step, value_shares

TASK = Task(
    name="t",
    instruction="Judge.",
    fields={"mood": ["good", "goods", "bad", "été"], "size": [1, 12, 2, None], "sure": [True, False]},
)
ANSWERS = list(TASK.answers())


def _cut(text: bytes, sizes: list[int]) -> list[bytes]:
    """Text in tokens of these sizes, again and again: any tokenizer, characters cut in two among them."""
    tokens, at, i = [], 0, 0
    while at < len(text):
        tokens.append(text[at : at + sizes[i % len(sizes)]])
        at, i = at + sizes[i % len(sizes)], i + 1
    return tokens


def _steps(chances: Mapping[Values, float], taken: Values, sizes: list[int], outside: float = 0.0, top: int = 99) -> list[Step]:
    """What an endpoint would list that writes whole answers with these chances, and at each step another token at times."""
    tokenized = {values: _cut(TASK.render(values).encode(), sizes) for values in chances}
    steps = []
    for i, token in enumerate(tokenized[taken]):
        alike = [v for v, tokens in tokenized.items() if tokens[:i] == tokenized[taken][:i] and len(tokens) > i]
        total = sum(chances[v] for v in alike)
        shares: dict[bytes, float] = {}
        for v in alike:
            shares[tokenized[v][i]] = shares.get(tokenized[v][i], 0) + (1 - outside) * chances[v] / total
        likeliest = dict(sorted(shares.items(), key=lambda pair: -pair[1])[:top])
        steps.append(Step(token, likeliest | {token: shares[token]} | ({b"\n\nSure": outside} if outside else {})))
    return steps


def _expected(chances: Mapping[Values, float], taken: Values) -> list[list[float]]:
    rows = []
    for field, allowed in enumerate(TASK.fields.values()):
        mine = [v for v in chances if all(type(a) is type(b) and a == b for a, b in zip(v[:field], taken[:field], strict=True))]
        total = sum(chances[v] for v in mine)
        sums = [sum(chances[v] for v in mine if type(v[field]) is type(w) and v[field] == w) / total for w in allowed]
        rows.append(sums)
    return rows


def _told_apart(taken: Values, field: int, sizes: list[int]) -> list[list[int]]:
    """A field's values, those together that begin with one token where they part from the answer: nothing tells them apart."""
    mine, groups = _cut(TASK.render(taken).encode(), sizes), dict[tuple[int, bytes], list[int]]()
    for i, value in enumerate(list(TASK.fields.values())[field]):
        other = _cut(TASK.render((*taken[:field], value, *taken[field + 1 :])).encode(), sizes)
        parted = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), -1)
        groups.setdefault((parted, other[parted]), []).append(i)
    return list(groups.values())


WEIGHTS = st.lists(st.floats(0.01, 1), min_size=len(ANSWERS), max_size=len(ANSWERS))


@settings(max_examples=60)
@given(WEIGHTS, st.sampled_from(ANSWERS), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0, 0.5))
def test_with_all_alternatives_they_are_exact_whatever_the_tokens(
    weights: list[float], taken: Values, sizes: list[int], outside: float
) -> None:
    chances = {values: weight / math.fsum(weights) for values, weight in zip(ANSWERS, weights, strict=True)}
    found = value_shares(TASK, taken, _steps(chances, taken, sizes, outside))
    for field, expected in enumerate(_expected(chances, taken)):
        for group in _told_apart(taken, field, sizes):
            assert sum(found[field][i] for i in group) == pytest.approx(sum(expected[i] for i in group), abs=1e-6)
        assert math.fsum(found[field]) == pytest.approx(1)


def test_a_value_that_no_alternative_fits_has_no_more_than_the_least_of_them() -> None:
    chances = {("good", 1, True): 0.5, ("bad", 1, True): 0.3, ("été", 1, True): 0.2}
    steps = _steps(chances, ("good", 1, True), [9], top=1)
    assert value_shares(TASK, ("good", 1, True), steps)[0] == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])
    few = [Step(step.token, {step.token: 0.6, b"x": 0.1} if b"good" in step.token else step.alternatives) for step in steps]
    assert value_shares(TASK, ("good", 1, True), few)[0] == pytest.approx([0.6 / 0.9, 0.1 / 0.9, 0.1 / 0.9, 0.1 / 0.9])


def test_an_answer_written_otherwise_is_read_all_the_same() -> None:
    text = '```json\n{\n  "sure": false,\n  "mood": "\\u00e9t\\u00e9",\n  "size": null\n}\n```'
    steps = [Step(bytes([b]), {bytes([b]): 0.9, b"t": 0.1}) for b in text.encode()]
    shares = value_shares(TASK, ("été", None, False), steps)
    assert shares[2] == pytest.approx([0.1, 0.9])
    assert [row[i] for row, i in zip(shares, (3, 3, 1), strict=True)] == [pytest.approx(v, abs=0.1) for v in (0.9, 0.9, 0.9)]


def test_what_is_not_found_leaves_the_value_alone() -> None:
    assert value_shares(TASK, ("bad", 2, True), [Step(b"bad", {b"bad": 0.5})]) == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 0]]


def test_a_token_that_the_answer_begins_with_too_stands_for_the_other_values() -> None:
    task = Task(name="t", instruction="Judge.", fields={"mood": ["confusion", "curiosity", "calm"]})
    steps = [
        Step(b'{"mood": "', {b'{"mood": "': 1.0}),
        Step(b"con", {b"con": 0.6, b"c": 0.4}),
        Step(b'fusion"}', {b'fusion"}': 1.0}),
    ]
    assert value_shares(task, ("confusion",), steps)[0] == pytest.approx([0.6, 0.2, 0.2])
