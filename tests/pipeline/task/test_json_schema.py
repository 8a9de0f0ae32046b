"""Schemas that people have, as tasks."""

from __future__ import annotations

import enum
import itertools
import json
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from pipeline.base.errors import UserError
from pipeline.cli.main import main
from pipeline.task.json_schema import content_of, model_schema
from pipeline.task.task import Task
from pipeline.task.task_file import load_task

scalars = st.one_of(st.text("abc.", max_size=2), st.integers(-2, 2), st.booleans(), st.none())
integers = st.builds(
    lambda low, width, step, strict: {
        "type": "integer",
        "exclusiveMinimum" if strict else "minimum": low,
        "maximum": low + width,
        "multipleOf": step,
    },
    st.integers(-3, 3),
    st.integers(3, 6),
    st.integers(1, 3),
    st.booleans(),
)
leaf = st.one_of(
    st.builds(lambda values: {"enum": values}, st.lists(scalars, min_size=1, max_size=3, unique_by=json.dumps)),
    st.builds(lambda value: {"const": value, "title": "x"}, scalars),
    st.sampled_from([{"type": "boolean"}, {"type": ["boolean", "null"]}, {"enum": ["a", "b"], "type": "string"}]),
    integers,
)
member = st.one_of(leaf, st.builds(lambda key, a, b: {key: [a, b]}, st.sampled_from(["anyOf", "oneOf"]), leaf, leaf))


def an_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def without(schema: dict[str, Any], places: set[int]) -> dict[str, Any]:
    """The same with some members that may be left out, but one."""
    values = [name for name, part in schema["properties"].items() if part.get("type") not in ("object", "array")]
    optional = {name for i, name in enumerate(values) if i in places and (i or len(values) < len(schema["properties"]))}
    return schema | {"required": [name for name in schema["required"] if name not in optional]}


places = st.sets(st.integers(0, 2))
names = st.text("ab./", min_size=1, max_size=2)
lists = st.builds(
    lambda labels, least, most: {"type": "array", "items": labels, "minItems": least, "maxItems": most, "uniqueItems": True},
    leaf,
    st.integers(0, 1),
    st.integers(1, 3),
)
objects = st.recursive(
    st.one_of(member, lists),
    lambda inner: st.builds(an_object, st.dictionaries(names, inner, min_size=1, max_size=2)).flatmap(
        lambda schema: st.builds(without, st.just(schema), places)
    ),
    max_leaves=3,
)
schemas = st.builds(without, st.builds(an_object, st.dictionaries(names, objects, min_size=1, max_size=3)), places)


def task_of(schema: dict[str, Any]) -> Task:
    return Task.model_validate(content_of(schema) | {"name": "t", "instruction": "Judge."})


def is_valid(schema: dict[str, Any], value: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


MISSING = object()


def meant(schema: dict[str, Any], name: str, value: Any) -> Any:
    """A member's value; of a null or an empty cell that it may not have, what it is read as."""
    part = schema["properties"][name]
    if value not in (None, "") or is_valid(part, value):
        return value
    if value == "" and is_valid(part, None):
        return None
    return value if name in schema["required"] else MISSING


def candidates(schema: dict[str, Any]) -> list[Any]:
    """Answers to try: every object of many values, in the schema's order."""
    if schema.get("type") == "array":
        return [
            None,
            *map(list, itertools.chain.from_iterable(itertools.combinations(["a", "", 0, 1, True], n) for n in range(4))),
        ]
    if schema.get("type") != "object":
        return [*"abc.", "aa", "", True, False, None, *range(-7, 13)]
    each = [[meant(schema, name, value) for value in candidates(part)] for name, part in schema["properties"].items()]
    return [
        {name: value for name, value in zip(schema["properties"], values, strict=True) if value is not MISSING}
        for values in itertools.islice(itertools.product(*each), 3000)
    ]


@settings(max_examples=40)
@given(schema=schemas)
def test_a_task_has_the_answers_that_its_schema_allows(schema: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    try:
        task = task_of(schema)
    except UserError as refused:
        assert "allows nothing" in str(refused)  # noqa: PT017
        assert not any(map(validator.is_valid, candidates(schema)))
        return
    written = [json.loads(task.render(values)) for values in itertools.islice(task.answers(), 300)]
    assert all(map(validator.is_valid, written))
    for answer in candidates(schema):
        assert (task.fit(answer) is not None) == validator.is_valid(answer), answer


class Tier(enum.Enum):
    GOLD, NONE = "gold", "none"


class Customer(BaseModel):
    tier: Tier = Tier.NONE
    age: int | None = Field(None, ge=18, lt=21)


class Triage(BaseModel):
    """What to do with a mail."""

    team: Literal["billing", "support"] = Field(description="who answers it")
    customer: Customer
    urgent: bool


def test_a_model_of_pydantic() -> None:
    task = task_of(model_schema(f"{__name__}:Triage"))
    assert task.fields == {
        "team": ["billing", "support"],
        "customer.tier": ["gold", "none"],
        "customer.age": [18, 19, 20, None],
        "urgent": [True, False],
    }
    for values in task.answers():
        Triage.model_validate_json(task.render(values))
    mine = Triage(team="billing", customer=Customer(), urgent=True)
    assert task.parse(task.render(("billing", "none", None, True))) == task.fit(mine.model_dump_json())


TEXT, ONE = {"type": "string"}, {"const": 1}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "string"}, "at its root is to be an object"),
        (an_object({"a/b": TEXT}), "at /properties/a~1b has no end of values"),
        (an_object({"a": an_object({"n": {"type": "integer"}})}), "at /properties/a/properties/n has no end of integers"),
        (an_object({"a": {"type": "integer", "minimum": 0, "maximum": 5000}}), "at /properties/a spans 0 to 5000"),
        (
            an_object({"a": {"type": "integer", "minimum": "0", "maximum": 5}}),
            "at /properties/a/minimum is none: '0' is not of type 'number'",
        ),
        (an_object({"a": {"type": "array"}}), "at /properties/a is a list of anything"),
        (an_object({"a": {"type": "array", "items": ONE, "maxItems": 0}}), "at /properties/a is always empty"),
        (an_object({"a": {"type": "array", "items": {"type": "array", "items": ONE}}}), "/properties/a/items is a list inside"),
        (an_object({"a": {"type": "array", "items": ONE, "contains": ONE}}), "at /properties/a says 'contains'"),
        (an_object({"a": {"enum": ["x"], "pattern": "y"}}), "at /properties/a says 'pattern'"),
        (an_object({"a": {"enum": [{"x": 1}]}}), 'lists {"x": 1}'),
        (an_object({"a": {"anyOf": [an_object({"b": ONE}), {"type": "null"}]}}), "/properties/a/anyOf/0 is an object among"),
        (an_object({"a": ONE}) | {"required": []}, "at its root may be empty"),
        (
            an_object({"a": ONE, "b": {"type": "array", "items": ONE}}) | {"required": ["a"]},
            "/b is a list that may be left out",
        ),
        ({"oneOf": [without(an_object({"a": ONE, "b": {"const": b}}), {1}) for b in "xy"]}, "at /oneOf differs in what may be"),
        (an_object({"a": an_object({"b": ONE})}) | {"required": []}, "at /properties/a is an object that may be left out"),
        (an_object({"a": {"$ref": "other.json"}}), "refers to 'other.json', which is not inside"),
        (an_object({"a": {"$ref": "#/$defs/x"}}), "refers to '#/$defs/x', where nothing is"),
        (an_object({"a": {"$ref": "#/$defs/x"}}) | {"$defs": {"x": {"$ref": "#/$defs/x"}}}, "at /$defs/x refers to itself"),
        (an_object({"a": 5}), "at /properties/a is none: 5 is not of type"),
        (an_object({"a": True}), "at /properties/a allows anything"),
        (an_object({"a": ONE}) | {"oneOf": [{}]}, "its root says 'oneOf'"),
        (an_object({"./": an_object({":|": ONE})}), "keys hold all of"),
    ],
)
def test_what_no_task_can_say_is_refused_by_its_place(schema: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as refused:
        content_of(schema)
    assert told in str(refused.value)


FLAGS = an_object({name: {"type": "boolean"} for name in ("sexual", "hate_and_discrimination", "pii")})
SCORE = {"type": "number"}
COMPLIANCE = {
    "is_violating": {"type": "boolean", "description": "Indicates if the content is violating guidelines"},
    "category": {"type": ["string", "null"], "enum": ["violence", "sexual", "self_harm"]},
    "explanation_if_violating": {"type": ["string", "null"]},
}


TAKEN = [
    (
        {"$defs": {"Labels": {"enum": ["spam", "not_spam"], "title": "Labels", "type": "string"}}}
        | an_object({"class_label": {"$ref": "#/$defs/Labels"}}),
        2,
    ),
    (
        an_object({"labels": {"type": "array", "items": {"enum": ["ACCOUNT", "BILLING", "GENERAL_QUERY"], "type": "string"}}}),
        8,
    ),
    (an_object({name: COMPLIANCE[name] for name in ("is_violating", "category")}), 6),
    (an_object({"categories": FLAGS}), 8),
]  # of Instructor's, OpenAI's and Mistral's documentation: docs/tasks.md names the pages


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        *TAKEN,
        (an_object(COMPLIANCE), "at /properties/explanation_if_violating has no end of values"),
        (
            {"type": "object", "properties": {"categories": FLAGS, "category_scores": an_object({"pii": SCORE})}},
            "at /properties/categories is an object that may be left out",
        ),
        (
            an_object({"positive_score": SCORE, "negative_score": SCORE, "neutral_score": SCORE}),
            "at /properties/positive_score has no end of values",
        ),
    ],
)
def test_schemas_of_public_documentation(schema: dict[str, Any], found: int | str) -> None:
    if isinstance(found, int):
        assert task_of(schema).outputs == found
    else:
        with pytest.raises(UserError) as refused:
            content_of(schema)
        assert found in str(refused.value)


@settings(max_examples=20)
@given(each=st.lists(st.tuples(leaf, leaf), min_size=2, max_size=3), third=leaf, key=st.sampled_from(["anyOf", "oneOf"]))
def test_objects_of_which_an_answer_is_one(each: list[tuple[dict[str, Any], ...]], third: dict[str, Any], key: str) -> None:
    """What they allow together; members that all have alike are none of the combination."""
    schema = {key: [an_object({"z": third, "a": a, "b": b}) for a, b in each]}
    either = jsonschema.Draft202012Validator(schema)
    try:
        task = task_of(schema)
    except UserError as refused:
        assert "allows nothing" in str(refused)  # noqa: PT017
        return
    assert all(either.is_valid(json.loads(task.render(values))) for values in task.answers())
    for answer in candidates(schema[key][0])[::7]:
        assert (task.fit(answer) is not None) == either.is_valid(answer), answer
    assert not task.combinations or task.combinations[0].fields == ["a", "b"]


def test_an_object_of_one_member_is_one_of_several() -> None:
    assert task_of({"oneOf": [an_object({"a": {"enum": [1, 2]}}), an_object({"a": {"enum": [2, 3]}})]}).fields == {"a": [1, 3]}


def test_objects_of_which_an_answer_is_one_are_refused_where_they_differ_in_more_than_values() -> None:
    one, tags = an_object({"a": ONE, "b": ONE}), {"type": "array", "items": ONE}
    with pytest.raises(UserError, match="at /oneOf has members of other names"):
        content_of({"oneOf": [one, an_object({"a": ONE})]})
    with pytest.raises(UserError, match="at /oneOf has lists that differ, or stand between what does: b"):
        content_of({"oneOf": [an_object({"a": ONE, "b": tags}), an_object({"a": {"const": 2}, "b": tags})]})


def test_an_object_that_holds_itself_is_refused() -> None:
    node = an_object({"leaf": ONE, "next": {"$ref": "#/$defs/node"}})
    with pytest.raises(UserError, match="without end"):
        content_of(node | {"$defs": {"node": node}})


def test_the_command_writes_a_task_and_a_task_may_name_a_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text("Sort this mail.\n")
    Path("answer.json").write_text(json.dumps(Triage.model_json_schema()))
    command = ["task", "--schema=answer.json", "--instruction=prompt.txt", "--out=triage.yaml"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "32 answers" in done.output
    task = load_task("triage.yaml")
    assert (task.name, task.instruction, task.fields) == (
        "triage",
        "Sort this mail.",
        task_of(Triage.model_json_schema()).fields,
    )
    Path("named.yaml").write_text("name: triage\ninstruction: Sort this mail.\nschema: answer.json\n")
    assert load_task(str(tmp_path / "named.yaml")).hash == task.hash
    Path("both.yaml").write_text("name: t\ninstruction: x\nschema: answer.json\nfields: {a: [x]}\n")
    with pytest.raises(UserError, match="has `fields` and a `schema`"):
        load_task("both.yaml")
    for change, told in (
        ([], "is there already"),
        (["--out=x.yaml", "--schema=prompt.txt"], "is no JSON"),
        (["--out=x.yaml", "--schema=no.such.module:Model"], "cannot import no.such.module"),
        (["--out=x.yaml", f"--schema={__name__}:TEXT"], "has no Pydantic model TEXT"),
    ):
        refused = CliRunner().invoke(main, [*command, *change])
        assert refused.exit_code == 1
        assert told in refused.output
