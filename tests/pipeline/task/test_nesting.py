"""Answers with objects inside them: how they are written, read and asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import TeacherConfig
from pipeline.task.compiled import compile_for
from pipeline.task.task import Task
from pipeline.task.tokenization import TeacherTokenizer
from pipeline.teacher.alternatives import Step, value_shares
from pipeline.teacher.endpoint import Endpoint
from tests.tiny import tiny_task, tiny_tokenizer

FIELDS = {
    "who.tier": ["gold", "none"],
    "who.asks.kind": ["bill", "none"],
    "what.kind": ["bill", "none"],
    "urgent": [True, False],
}
ANSWER = {"who": {"tier": "gold", "asks": {"kind": "none"}}, "what": {"kind": "bill"}, "urgent": False}
VALUES = ("gold", "none", "bill", False)

keys = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=4)
values = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)
trees = st.recursive(values, lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=6)
objects = st.dictionaries(keys, trees, min_size=1, max_size=3)


def leaves(tree: dict[str, Any], before: str = "") -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for key, part in tree.items():
        found |= leaves(part, f"{before}{key}.") if isinstance(part, dict) else {before + key: part}
    return found


def first(tree: Any) -> Any:
    return {key: first(part) for key, part in tree.items()} if isinstance(tree, dict) else tree[0]


def nested_task(fields: dict[str, Any] = FIELDS, **changes: Any) -> Task:
    return tiny_task(fields=fields, format={"nesting": "."} | changes, context=None)


@given(tree=objects, indent=st.sampled_from([None, 0, 2]))
def test_it_is_written_as_json_has_it_and_read_back(tree: dict[str, Any], indent: int | None) -> None:
    task, answer = nested_task(leaves(tree), indent=indent, prefix="<", suffix=">"), first(tree)
    values = tuple(allowed[0] for allowed in task.fields.values())
    written = json.dumps(answer, indent=indent, separators=(", " if indent is None else ",", ": "), ensure_ascii=False)
    assert task.render(values) == f"<{written}>"
    assert task.parse(task.render(values)) == values
    assert task.nested(dict(zip(task.fields, values, strict=True))) == answer
    assert task.fit(answer) == task.fit(written) == task.fit(dict(zip(task.fields, values, strict=True))) == values


@pytest.mark.parametrize(
    "wrong",
    [
        {"who.tier": "gold", "who.asks.kind": "none", "what.kind": "bill", "urgent": False},
        {"who": {"tier": "gold", "asks": "none"}, "what": {"kind": "bill"}, "urgent": False},
        {"urgent": False} | ANSWER,
    ],
)
def test_what_is_written_otherwise_is_no_answer_of_the_teachers(wrong: dict[str, Any]) -> None:
    assert nested_task().parse(json.dumps(wrong)) is None


def test_a_name_with_the_mark_is_a_name_where_nothing_nests() -> None:
    task = tiny_task(fields=FIELDS)
    assert task.render(VALUES).startswith('{"who.tier": "gold", ')
    assert task.fit(ANSWER) is None
    assert task.hash != nested_task().hash


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a", "a.b"], "field 'a.b' is in no object"),
        (["a.b", "c", "a.d"], "must follow each other"),
    ],
)
def test_names_that_make_no_object_are_refused(names: list[str], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        nested_task({name: [1, 2] for name in names})


def test_every_answer_is_a_path_of_the_automaton() -> None:
    task, tokenizer = nested_task(), TeacherTokenizer(tiny_tokenizer())
    compiled = compile_for(task, tokenizer)
    assert compiled.automaton.answers == task.outputs == 16
    assert all(compiled.automaton.accepts(compiled.tokens(values)) for values in task.answers())


def test_an_api_is_asked_for_objects() -> None:
    config = TeacherConfig(engine="openai", url="http://localhost:1/v1")
    schema = Endpoint("m", config, nested_task())._optional["response_format"]["json_schema"]["schema"]
    who = schema["properties"]["who"]
    assert list(schema["properties"]) == schema["required"] == ["who", "what", "urgent"]
    assert who["properties"]["asks"]["properties"] == {"kind": {"type": ["string"], "enum": ["bill", "none"]}}
    assert who["additionalProperties"] is False


def test_an_api_is_shown_the_system_turn_and_the_examples() -> None:
    task = nested_task().model_copy(update={"system": "Judge.", "template": {"enable_thinking": False}})
    config = TeacherConfig(engine="openai", url="http://localhost:1/v1")
    endpoint, plain = Endpoint("m", config, task), Endpoint("m", config, nested_task())
    assert endpoint._optional["extra_body"] == {"chat_template_kwargs": {"enable_thinking": False}}
    assert endpoint.bound(10).input_tokens == plain.bound(10).input_tokens + len("Judge.")


def test_the_alternatives_of_members_with_one_name_are_told_apart() -> None:
    task = nested_task()
    head, tail = task.render(VALUES).encode().split(b'"none"')
    steps = [
        Step(head, {head: 1.0}),
        Step(b'"none"', {b'"none"': 0.7, b'"bill"': 0.3}),
        Step(tail, {tail: 1.0}),
    ]
    shares = value_shares(task, VALUES, steps)
    assert shares[1] == pytest.approx([0.3, 0.7])
    assert shares[2] == [1, 0]
