from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.task.task import MAX_VALUES, Task
from pipeline.task.task_file import dump_task, load_task
from tests.pipeline.task.test_task import CONTENT, changed, fields, make_task

TASKS = sorted((Path(__file__).parents[3] / "tasks").glob("*.yaml"))


def write_yaml(folder: Path, content: Any) -> str:
    path = folder / "task.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("fields.free", {"type": "string"}, "'free' is not finite"),
        ("fields.n", {"type": "integer"}, "'n' is not finite"),
        ("fields.n", {"type": "integer", "minimum": 0}, "'n' is not finite"),
        ("fields.n", {"type": "number", "minimum": 0, "maximum": 1}, "'n' is not finite"),
        ("fields.n", {"type": "integer", "minimum": False, "maximum": 1}, "'n' is not finite"),
        ("fields.n", {"type": "integer", "minimum": 3, "maximum": 1}, "'n' spans 3 to 1"),
        ("fields.n", {"type": "integer", "minimum": 0, "maximum": 1000}, "'n' spans 0 to 1000"),
        ("fields.free", "string", "'free' must list its values"),
        ("fields.free", [], "'free' must list its values"),
        ("fields.twice", ["x", "y", "x"], "'twice' lists \"x\" twice"),
        ("fields.twice", [1, 1], "'twice' lists 1 twice"),
        ("fields.twice", [None, None], "'twice' lists null twice"),
        ("fields.nested", [["x"]], "'nested'"),
        ("fields.nested", [{"x": 1}], "'nested'"),
        ("fields.inf", [float("inf")], "'inf'"),
        ("fields.inf", [float("nan")], "'inf'"),
        ("fields", {}, "fields"),
        ("fields", ["a"], "fields: must map"),
        ("unknown", 1, "unknown: unknown key"),
        ("format.unknown", 1, "format.unknown: unknown key"),
        ("comments.unknown", 1, "comments.unknown: unknown key"),
        ("format.item_separator", ";", "format.item_separator: must be ','"),
        ("format.item_separator", ",,", "format.item_separator"),
        ("format.item_separator", "", "format.item_separator"),
        ("format.key_separator", "=", "format.key_separator: must be ':'"),
        ("format.key_separator", ":\u00a0", "format.key_separator"),
        ("format.indent", -1, "format.indent"),
        ("comments.min_tokens", 26, r"min_tokens \(26\) is larger than max_tokens \(25\)"),
        ("comments.min_tokens", 0, "comments.min_tokens"),
        ("prompt", "no comment", "prompt: must hold {comment}"),
        ("prompt", "{comment}{comment}", "prompt: must hold {comment}"),
        ("prompt", "{comment}{instruction}{instruction}", "prompt: must hold"),
        ("instruction", "", "instruction"),
        ("name", "a/b", "name"),
        ("context", "long", "context"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, path: str, value: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_task(write_yaml(tmp_path, changed(path, value)))


def test_a_date_among_the_values_is_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(CONTENT).replace("- x\n", "- 2020-01-01\n")
    with pytest.raises(UserError, match=r"line 6: YAML reads `2020-01-01` as a date: write .* in quotes"):
        load_task(write_yaml(tmp_path, text))


def test_a_value_that_is_no_whole_text_is_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(CONTENT).replace("- x\n", '- "\\ud800"\n')
    with pytest.raises(UserError, match=r"line 6: .*ud800"):
        load_task(write_yaml(tmp_path, text))


def load_values(folder: Path, values: str) -> list[Any]:
    """Values as they are written in a task file, on its line 7."""
    head = {key: value for key, value in CONTENT.items() if key != "fields"}
    text = yaml.safe_dump(head, sort_keys=False) + f"fields: {{a: {values}}}\n"
    return load_task(write_yaml(folder, text)).fields["a"]


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ('[translate, "yes", "no"]', ["translate", "yes", "no"]),
        ("[translate, 'on', 'off']", ["translate", "on", "off"]),
        ('["012", "1e3", "2024-02-29", "~", "null", ""]', ["012", "1e3", "2024-02-29", "~", "null", ""]),
        ("[true, false]", [True, False]),
        ("[True, FALSE]", [True, False]),
        ("[low, high, null]", ["low", "high", None]),
        ('["low", 1, true, null]', ["low", 1, True, None]),
        ("[-1, 0, 0.5, 1.50, 1.0e+16]", [-1, 0, 0.5, 1.5, 1e16]),
        ("[y, n, NaN, .5.1, 1-2]", ["y", "n", "NaN", ".5.1", "1-2"]),
    ],
)
def test_values_are_read_as_they_are_written(tmp_path: Path, values: str, read: list[Any]) -> None:
    found = load_values(tmp_path, values)
    assert [(type(value), value) for value in found] == [(type(value), value) for value in read]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("[translate, yes]", """lists `yes`, which YAML reads as true beside the strings 'translate': write "yes" in quotes"""),
        ("[yes, no]", 'lists `yes`, which YAML reads as true: write "yes" in quotes for the string, or true for what JSON'),
        ("[maybe, true]", """lists `true`, which YAML reads as true beside the strings 'maybe': write "true" in quotes"""),
        ("[none, 'few', 3]", """lists `3`, which YAML reads as 3 beside the strings 'none': write "3" in quotes"""),
        ("[low, 0.5]", """lists `0.5`, which YAML reads as 0.5 beside the strings 'low': write "0.5" in quotes"""),
        ("[a, b, c, d, 5]", "lists `5`, which YAML reads as 5 beside the strings 'a', 'b', 'c', …: write"),
        ("[+1, -1]", 'lists `+1`, which YAML reads as 1: write "+1" in quotes for the string, or 1 for'),
        ("[.5]", 'lists `.5`, which YAML reads as 0.5: write ".5" in quotes for the string, or 0.5 for'),
        ("[0x1f]", 'lists `0x1f`, which YAML reads as 31: write "0x1f" in quotes for the string, or 31 for'),
        ("[1e3]", 'lists `1e3`, which YAML reads as "1e3": write "1e3" in quotes for the string, or 1000.0 for'),
        ("[low, NULL, ~]", "lists `~`, which YAML reads as null beside the strings 'low': write \"~\" in quotes"),
    ],
)
def test_a_value_that_yaml_takes_for_another_is_refused_with_what_to_write(tmp_path: Path, values: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_values(tmp_path, values)
    assert "task.yaml, line 7: field 'a' " + told in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "instruction", "fields"])
def test_a_missing_key_is_named(tmp_path: Path, missing: str) -> None:
    with pytest.raises(UserError, match=f"{missing}: Field required"):
        load_task(write_yaml(tmp_path, {key: value for key, value in CONTENT.items() if key != missing}))


@pytest.mark.parametrize(
    ("extra", "named"),
    [("name: again\n", "name written twice"), ("x: {a: [1], a: [2]}\n", "line 16: a written twice in one mapping")],
)
def test_a_key_written_twice_is_refused(tmp_path: Path, extra: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_task(write_yaml(tmp_path, yaml.safe_dump(CONTENT) + extra))


@pytest.mark.parametrize("text", ["", "- a list", "just text", "a: [", "a: \x00"])
def test_what_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"task\.yaml"):
        load_task(write_yaml(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file at .*absent\.yaml"):
        load_task(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_the_tasks_of_the_repository_load(path: Path) -> None:
    task = load_task(str(path))
    assert task.name == path.stem
    assert task.outputs > 1


@settings(max_examples=50)
@given(fields=fields, instruction=st.text(min_size=1, max_size=20), indent=st.sampled_from([None, 2]))
def test_a_dumped_task_loads_the_same(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], instruction: str, indent: int | None
) -> None:
    task = Task.model_validate(CONTENT | {"fields": fields, "instruction": instruction, "format": {"indent": indent}})
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_bytes(dump_task(task).encode())
    loaded = load_task(str(path))
    assert loaded == task
    assert loaded.hash == task.hash


@pytest.mark.parametrize(
    "fields",
    [
        {f"😀{i}": [None] for i in range(MAX_VALUES)},
        {"a": [f"v{i}" for i in range(MAX_VALUES)]},
        {"a": ["\x01 \n\x85" * 10_000, "😀" * 15_000, "' \" " * 30_000]},
    ],
    ids=["fields", "values", "characters"],
)
def test_the_largest_tasks_are_read_back(tmp_path: Path, fields: dict[str, Any]) -> None:
    task = make_task("fields", fields)
    (tmp_path / "task.yaml").write_text(dump_task(task))
    assert load_task(str(tmp_path / "task.yaml")) == task


def test_a_task_keeps_the_hash_that_it_had_before_it_could_say_more() -> None:
    assert load_task("tasks/goemotions.yaml").hash == "4f7efce4c148260a"
