from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.task.task import MAX_CHARACTERS, MAX_VALUES, Task

CONTENT: dict[str, Any] = {
    "name": "t",
    "teacher": "none",
    "instruction": "Judge.",
    "fields": {"a": ["x", "y"], "b": [True, 1, "1", None]},
    "comments": {"min_tokens": 2, "max_tokens": 25},
}

scalars = st.one_of(
    st.text(max_size=6), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False)
)
value_lists = st.lists(scalars, min_size=1, max_size=5, unique_by=json.dumps)
fields = st.dictionaries(st.text(max_size=5), value_lists, min_size=1, max_size=4)
separators = st.sampled_from([(", ", ": "), (",", ":"), (" ,\n", "\t: ")])


def changed(path: str, value: Any) -> dict[str, Any]:
    """The usual content with one key, by dotted path, set anew."""
    content = copy.deepcopy(CONTENT)
    *parents, leaf = path.split(".")
    inner = content
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[leaf] = value
    return content


def make_task(path: str = "name", value: Any = "t") -> Task:
    return Task.model_validate(changed(path, value))


def test_values_of_different_types_are_different() -> None:
    task = make_task("fields", {"a": [1, True, "1", "true", 1.0, None, "null", 0, False]})
    assert [type(value) for (value,) in task.answers()] == [int, bool, str, str, float, type(None), str, int, bool]
    assert len({task.render(answer) for answer in task.answers()}) == task.outputs == 9


def test_typed_fields_are_spelt_out() -> None:
    task = make_task("fields", {"flag": {"type": "boolean"}, "n": {"type": "integer", "minimum": -1, "maximum": 1}})
    assert task.fields == {"flag": [True, False], "n": [-1, 0, 1]}
    assert task.outputs == 6


@given(fields=fields, data=st.data(), separators=separators, indent=st.sampled_from([None, 0, 1, 4]))
def test_render_is_json_dumps(
    fields: dict[str, Any], data: st.DataObject, separators: tuple[str, str], indent: int | None
) -> None:
    item, key = separators
    task = Task.model_validate(
        CONTENT | {"fields": fields, "format": {"item_separator": item, "key_separator": key, "indent": indent}}
    )
    answer = tuple(data.draw(st.sampled_from(values)) for values in fields.values())
    wanted = json.dumps(
        dict(zip(fields, answer, strict=True)),
        ensure_ascii=False,
        indent=indent,
        separators=(item if indent is None else item.rstrip(), key),
    )
    assert task.render(answer) == wanted


@given(
    fields=fields,
    data=st.data(),
    prefix=st.sampled_from(["", "```json\n", "{"]),
    suffix=st.sampled_from(["", "\n```", "}"]),
    indent=st.sampled_from([None, 2]),
)
def test_parse_undoes_render(fields: dict[str, Any], data: st.DataObject, prefix: str, suffix: str, indent: int | None) -> None:
    task = Task.model_validate(CONTENT | {"fields": fields, "format": {"prefix": prefix, "suffix": suffix, "indent": indent}})
    answer = tuple(data.draw(st.sampled_from(values)) for values in fields.values())
    parsed = task.parse(task.render(answer))
    assert parsed is not None
    assert [(type(value), value) for value in parsed] == [(type(value), value) for value in answer]


@given(fields=fields)
def test_rendered_answers_are_the_literals_around_the_values(fields: dict[str, Any]) -> None:
    task = Task.model_validate(CONTENT | {"fields": fields})
    first = [texts[0] for texts in task.value_texts()]
    literals = task.literals()
    assert len(literals) == len(fields) + 1
    joined = literals[0] + "".join(value + literal for value, literal in zip(first, literals[1:], strict=True))
    assert joined == task.render(next(task.answers()))


def test_every_answer_is_written_differently() -> None:
    task = make_task()
    assert len({task.render(answer) for answer in task.answers()}) == task.outputs == 8


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "x", "b": 1.0}',
        '{"a": "x", "b": false}',
        '{"a": "x", "b": "true"}',
        '{"a": "z", "b": 1}',
        '{"b": 1, "a": "x"}',
        '{"a": "x"}',
        '{"a": "x", "b": 1, "c": 1}',
        '{"a": "z", "a": "x", "b": 1}',
        '{"a": "x", "b": 1} and more',
        'Sure: {"a": "x", "b": 1}',
        '["x", 1]',
        '"x"',
        "",
        '{"a": "x", "b": NaN}',
        "[" * 100_000,
        '{"a": "x", "b": ' + "1" * 5000 + "}",
    ],
    ids=lambda text: text[:40],
)
def test_parse_rejects(text: str) -> None:
    assert make_task().parse(text) is None


def test_parse_tells_true_from_one() -> None:
    only_true, only_one = make_task("fields", {"b": [True]}), make_task("fields", {"b": [1]})
    assert only_true.parse('{"b": true}') == (True,)
    assert only_true.parse('{"b": 1}') is None
    assert only_one.parse('{"b": true}') is None


@given(text=st.text(max_size=40))
def test_parse_never_raises(text: str) -> None:
    assert make_task().parse(text) in (None, *make_task().answers())


def test_user_turn_puts_the_comment_in_as_it_is() -> None:
    task = make_task("prompt", "<{comment}> {instruction}")
    assert task.user_turn("{instruction} {comment} \\1") == "<{instruction} {comment} \\1> Judge."
    assert make_task().user_turn("hi") == "Judge.\n\nhi"


def test_an_input_names_columns() -> None:
    task = make_task("input", "{title}\n{body}")
    assert task.columns == ["title", "body"]
    assert task.text_of({"title": "a {body}", "body": "b", "other": 1}) == "a {body}\nb"
    assert task.text_of("joined") == "joined"
    assert make_task().text_of({"title": "a"}) == {"title": "a"}
    with pytest.raises(ValidationError, match="must name columns in braces"):
        make_task("input", "no column")


@pytest.mark.parametrize("path", ["name", "teacher"])
def test_the_hash_leaves_names_out(path: str) -> None:
    assert make_task(path, "another").hash == make_task().hash


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("instruction", "Judge!"),
        ("prompt", "{comment}"),
        ("fields.a", ["y", "x"]),
        ("fields.a", ["x", "y", "z"]),
        ("fields", {"b": CONTENT["fields"]["b"], "a": CONTENT["fields"]["a"]}),
        ("fields.b", [1, True, "1", None]),
        ("format.prefix", " "),
        ("format.suffix", " "),
        ("format.indent", 2),
        ("format.item_separator", ","),
        ("format.key_separator", ":"),
        ("format.nesting", "."),
        ("system", "You judge."),
        ("examples", [{"comment": "x", "answer": {"a": "x", "b": 1}}]),
        ("template", {"enable_thinking": False}),
        ("comments.min_tokens", 1),
        ("comments.max_tokens", 26),
        ("comments.urls", True),
        ("comments.special_tokens", True),
        ("separator", "\n"),
        ("context", 76),
        ("auxiliary_tokens", 279),
    ],
)
def test_the_hash_tells_what_matters(path: str, value: Any) -> None:
    assert make_task(path, value).hash != make_task().hash


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"a": list(range(MAX_VALUES)), "b": [0]}, "the fields list 10,001 values, more than 10,000"),
        ({"a": ["x" * MAX_CHARACTERS]}, "characters as JSON, more than 500,000"),
    ],
)
def test_a_task_is_bounded(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        make_task("fields", fields)


def test_a_task_does_not_change() -> None:
    with pytest.raises(ValidationError):
        make_task().context = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ({"b": True, "a": "x"}, True),
        ({"a": "x", "b": True}, True),
        ('{"a": "x", "b": true}', True),
        (' {"a":"x",\n"b":true} ', True),
        ({"a": "x"}, False),
        ({"a": "x", "b": True, "c": 1}, False),
        ({"a": "x", "b": 1}, False),
        ({"a": "X", "b": True}, False),
        ({"a": ["x"], "b": True}, False),
        ("x", False),
        (None, False),
        (3, False),
        ([("a", "x"), ("b", True)], False),
    ],
)
def test_given_answers_fit_as_text_or_mapping(answer: object, fits: bool) -> None:
    task = make_task("fields", {"a": ["x", "y"], "b": [True, False]})
    assert task.fit(answer) == (("x", True) if fits else None)


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        ({"a": "x", "b": "true"}, True),
        ({"a": "x", "b": "True"}, True),
        ('{"b": true, "a": "x"}', True),
        ('{"a": "x", "b": true, "b": false}', False),
        ({"a": "x", "b": "yes"}, False),
        ("x", False),
    ],
)
def test_given_answers_may_be_in_any_order_and_hold_text_of_a_csv_file(given: object, fits: bool) -> None:
    task = make_task("fields", {"a": ["x", "y"], "b": [True, False]})
    assert task.fit(given) == (("x", True) if fits else None)


def test_the_only_field_of_a_task_is_given_as_it_is() -> None:
    task = make_task("fields", {"stars": [1, 2, 3]})
    assert [task.fit(given) for given in (2, "2", {"stars": 2}, '{"stars": 2}', "4")] == [(2,)] * 4 + [None]


def test_a_misfit_says_what_is_expected_or_which_value_is_wrong() -> None:
    task = make_task("fields", {"a": ["x", "y"], "b": [True, False]})
    assert task.misfit("translate") == "'translate' is not an object with a and b"
    assert task.misfit({"a": "z", "b": True}) == "a is 'z', which is none of its 2 values"
    assert len(task.misfit("long " * 1000)) < 150
