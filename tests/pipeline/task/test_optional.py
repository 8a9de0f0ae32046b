"""Fields that an answer may leave out: how they are written, read and asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import TeacherConfig
from pipeline.task.compiled import compile_for
from pipeline.task.fitted_tokenizer import fit_tokenizer
from pipeline.task.task import Task
from pipeline.teacher.alternatives import value_shares
from pipeline.teacher.endpoint import Endpoint
from tests.tiny import tiny_task

FIELDS = {"a": [1, None], "b": ["x", "y", None], "c": [True, None]}
subsets = st.lists(st.sampled_from(list(FIELDS)), max_size=2, unique=True)


def optional_task(names: list[str], fields: dict[str, Any] = FIELDS, **changes: Any) -> Task:
    return tiny_task(fields=fields, optional=names, context=None, **changes)


@given(names=subsets, indent=st.sampled_from([None, 0, 2]), nested=st.booleans(), data=st.data())
def test_null_is_left_out_as_json_would_have_it(
    names: list[str], indent: int | None, nested: bool, data: st.DataObject
) -> None:
    inside = "o." if nested else ""
    fields = {inside + name: values for name, values in FIELDS.items()}
    task = optional_task(
        [inside + name for name in names], fields, format={"indent": indent, "nesting": "." if nested else None}
    )
    values = data.draw(st.sampled_from(list(task.answers())))
    named = dict(zip(FIELDS, values, strict=True))
    there = {name: value for name, value in named.items() if value is not None or name not in names}
    answer = {"o": there} if nested else there
    written = json.dumps(answer, indent=indent, separators=(", " if indent is None else ",", ": "))
    assert task.render(values) == written
    assert task.parse(written) == task.fit(answer) == task.fit(written) == values
    assert task.nested(dict(zip(task.fields, values, strict=True))) == answer
    assert task.fit({inside + name: value for name, value in named.items()}) == values  # a log says null
    stated = {inside + name: value for name, value in named.items() if value is not None}
    for given_so in (stated, dict.fromkeys(task.fields, "") | stated):  # what is missing, or an empty cell, is null
        assert task.fit(given_so) == (values if stated else None)  # nothing at all is no answer


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"optional": ["d"]}, "'d' is no field: the fields are a, b, c"),
        ({"optional": ["a", "b", "c"]}, "'a' is in an object that may be empty"),
        ({"optional": ["a"], "fields": FIELDS | {"a": [1]}}, "'a' does not list null"),
        ({"optional": ["b"], "lists": {"b": {}}}, "'b' is a list, or in a combination"),
        (
            {"optional": ["b"], "combinations": [{"fields": ["a", "b"], "values": [[1, "x"], [None, "y"], [1, None]]}]},
            "'b' is a list, or in a combination",
        ),
    ],
)
def test_what_cannot_be_left_out_is_refused(content: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        tiny_task(**{"fields": FIELDS} | content)


def test_a_task_that_leaves_nothing_out_has_the_hash_from_before() -> None:
    assert optional_task([]).hash == tiny_task(fields=FIELDS, context=None).hash != optional_task(["a"]).hash


def test_an_endpoint_says_null() -> None:
    """As OpenAI's strict mode has it, where all members are required."""
    task = optional_task(["b"])
    endpoint = Endpoint("m", TeacherConfig(engine="openai", url="http://localhost:1/v1"), task)
    schema = endpoint._optional["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["a", "b", "c"]
    assert schema["properties"]["b"]["enum"] == ["x", "y", None]
    assert value_shares(task, (1, None, True), []) == [[1, 0], [0, 0, 1], [1, 0]]


def test_a_fitted_tokenizer_has_a_choice_for_each_value_and_for_none() -> None:
    task = optional_task(["b"])
    compiled = compile_for(task, fit_tokenizer(["a text", "another text"], task))
    for values in task.answers():
        (ids,) = compiled.tokenizer.encode([task.render(values)])
        states = compiled.automaton.walk([*ids, compiled.tokenizer.end_id])
        assert sum(not compiled.automaton.forced[state] for state in states[:-1]) == 3
