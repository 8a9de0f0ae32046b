"""Fields that are lists of labels: which lists there are, how they are written, read, given and asked for."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.base.errors import UserError
from pipeline.config import TeacherConfig
from pipeline.task.compilation import compile_automaton
from pipeline.task.compiled import compile_for
from pipeline.task.fitted_tokenizer import fit_tokenizer
from pipeline.task.given_shares import fit_shares
from pipeline.task.lists import Begun, ListRule
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer, load_teacher_tokenizer
from pipeline.teacher.alternatives import Step, value_shares
from pipeline.teacher.endpoint import Endpoint
from tests.conftest import RealCase
from tests.tiny import tiny_task

LABELS = ["joy", "love", "anger", True, 1]
rules = st.builds(ListRule, min=st.integers(0, 2), max=st.sampled_from([None, 2, 3]), order=st.sampled_from(["listed", "any"]))


def list_task(rule: dict[str, Any] | None = None, **changes: Any) -> Task:
    fields = {"tags": LABELS, "urgent": [True, False]}
    return tiny_task(**({"fields": fields, "lists": {"tags": rule or {}}, "context": None} | changes))


def brute_force(rule: ListRule, labels: int) -> set[tuple[int, ...]]:
    longest = labels if rule.max is None else min(labels, rule.max)
    every = {way for size in range(rule.min, longest + 1) for way in itertools.product(range(labels), repeat=size)}
    return {way for way in every if len(set(way)) == len(way) and (rule.order == "any" or list(way) == sorted(way))}


@given(rule=rules, labels=st.integers(2, 4))
def test_lists_are_those_of_the_rule(rule: ListRule, labels: int) -> None:
    expected, rng = brute_force(rule, labels), random.Random(0)
    assert rule.count(labels) == len(expected)
    assert set(rule.every(range(labels))) == expected
    assert max(map(len, expected)) == rule.most(labels)
    drawn = [rule.draw(range(labels), rng, 1) for _ in range(20)]
    assert all(some in expected and (1 in some or not some) for some in drawn)
    found, begun = set(), [((), Begun())]
    for way, state in begun:
        if len(way) >= rule.min:
            found.add(way)
        begun += [((*way, label), further) for label, further in rule.following(state, labels)]
    assert found == expected


@given(data=st.data(), indent=st.sampled_from([None, 0, 2]), nested=st.booleans())
def test_a_list_is_written_as_json_has_it_and_read_back(data: st.DataObject, indent: int | None, nested: bool) -> None:
    fields = {"a.tags" if nested else "tags": LABELS, "urgent": [True, False]}
    format_ = {"indent": indent, "nesting": "." if nested else None}
    task = list_task(fields=fields, lists={next(iter(fields)): {}}, format=format_)
    values = data.draw(st.sampled_from(list(task.answers())))
    answer = task.nested(dict(zip(task.fields, values, strict=True)))
    written = json.dumps(answer, indent=indent, separators=(", " if indent is None else ",", ": "))
    assert task.render(values) == written
    assert len(written) <= task.longest
    assert task.parse(written) == task.fit(answer) == task.fit(written) == values


def test_a_list_in_any_order_is_the_same_answer() -> None:
    task = list_task({"order": "any"})
    assert task.written('{"tags": [1, "joy"], "urgent": true}') == ((1, "joy"), True)
    assert task.parse('{"tags": [1, "joy"], "urgent": true}') == (("joy", 1), True)
    assert list_task().parse('{"tags": [1, "joy"], "urgent": true}') is None
    assert list_task().fit({"tags": [1, "joy", "joy"], "urgent": True}) == (("joy", 1), True)


@pytest.mark.parametrize(
    ("given_", "why"),
    [
        ("joy", "tags is 'joy', not a list of 1 to 2 of its 5 labels"),
        ([], "not a list of 1 to 2"),
        (["joy", "love", "anger"], "not a list of 1 to 2"),
        (["joy", "hate"], "not a list of 1 to 2"),
        ("[1, 1.0]", "not a list of 1 to 2"),
    ],
)
def test_a_list_that_is_none_of_the_task_is_refused(given_: Any, why: str) -> None:
    task = list_task({"min": 1, "max": 2})
    assert task.fit({"tags": given_, "urgent": True}) is None
    assert why in task.misfit({"tags": given_, "urgent": True})


def test_a_list_may_be_given_as_text() -> None:
    assert list_task().fit({"tags": '["love", "joy"]', "urgent": "true"}) == (("joy", "love"), True)
    assert list_task(fields={"tags": LABELS}).fit(["love"]) == (("love",),)


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ({"moods": {}}, r"lists\.moods is no field"),
        ({"tags": {"min": 6}}, r"lists\.tags\.min is 6, and the field has 5 labels"),
        ({"tags": {"min": 2, "max": 1}}, r"min \(2\) is larger than max \(1\)"),
    ],
)
def test_rules_that_cannot_be(lists: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        list_task(lists=lists)


def test_a_task_without_lists_has_the_hash_from_before_there_were_any() -> None:
    assert tiny_task().hash == tiny_task(lists={}).hash
    assert list_task().hash != list_task({"max": 2}).hash


def test_near_lists_have_a_label_more_or_less() -> None:
    task = list_task({"min": 1, "max": 2})
    near = [("joy", "love"), ("joy", "anger"), ("joy", True), ("joy", 1)]
    assert task.near((("joy",), True)) == [*((labels, True) for labels in near), (("joy",), False)]
    assert task.near((("joy", 1), True))[:2] == [((1,), True), (("joy",), True)]


def test_a_fitted_tokenizer_has_a_choice_for_each_label_and_for_the_end() -> None:
    task = list_task()
    compiled = compile_for(task, fit_tokenizer(["i love it"] * 9, task))
    tokens = [compiled.tokenizer.decode([token]) for token in compiled.tokens((("love", "anger"), False))]
    assert '["love"' in tokens
    assert ', "anger"' in tokens


WORDS = [f"{first} {second:02}" for first in ("refund", "of a", "card", "to", "lost") for second in range(30)]


def deep_task() -> Task:
    """Twelve fields of two hundred values, three objects deep, with a list of up to five of 150 labels among them."""
    values = [f"{first} {second}" for first in ("refund", "of a", "card", "to") for second in range(50)]
    fields = {f"a.b.f{i}": values for i in range(6)} | {"a.b.c.tags": WORDS} | {f"z{i}": values for i in range(6)}
    return list_task(fields=fields, lists={"a.b.c.tags": {"max": 5}}, format={"nesting": "."})


DEEP, ALL = deep_task(), list_task(fields={"tags": WORDS})
ANY_ORDER = list_task({"max": 3, "order": "any"}, fields={"tags": WORDS[:28]})
ONE = list_task({"min": 1, "max": 1}, fields={"tags": WORDS, "z": WORDS, "y": WORDS})


@pytest.mark.parametrize(
    ("task", "kind"),
    [(DEEP, "real"), (DEEP, "fitted"), (ALL, "byte_level"), (ANY_ORDER, "gemma"), (ONE, "byte_level")],
    ids=["deep", "deep, fitted", "all of 150", "any order", "one of 150"],
)
def test_large_lists_compile_in_seconds(
    real_case: RealCase, tokenizers: dict[str, TextTokenizer], task: Task, kind: str
) -> None:
    if kind == "real":
        tokenizer: TextTokenizer = load_teacher_tokenizer(str(real_case.teacher))
    else:
        tokenizer = fit_tokenizer(["i love the card"] * 9, task) if kind == "fitted" else tokenizers[kind]
    started = time.process_time()
    automaton = compile_automaton(task, tokenizer)
    assert time.process_time() - started < 10
    assert automaton.answers == task.outputs
    assert automaton.next_state.nbytes < 1 << 30


def test_lists_of_too_many_beginnings_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="any order has too many beginnings: give it a smaller max, or order: listed"):
        compile_automaton(list_task({"order": "any"}, fields={"tags": WORDS[:60]}), tokenizer)


def test_an_endpoint_is_asked_for_a_list_and_says_nothing_of_its_shares() -> None:
    task = list_task(fields={"who.tags": ["a", "b"]}, lists={"who.tags": {"min": 1}}, format={"nesting": "."})
    config = TeacherConfig(engine="openai", url="http://localhost:1/v1")
    schema = Endpoint("m", config, task)._optional["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["who"]["properties"]["tags"] == {
        "type": "array",
        "items": {"type": ["string"], "enum": ["a", "b"]},
        "minItems": 1,
        "maxItems": 2,
    }
    text = b'{"tags": ["joy"], "urgent": true}'
    assert value_shares(list_task(), (("joy",), True), [Step(text, {text: 1.0})])[0] == []
    with pytest.raises(ValueError, match="tags is a list, of which shares say too little"):
        fit_shares(list_task(), "{}")
