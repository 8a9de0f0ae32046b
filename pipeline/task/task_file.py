"""Task files: YAML that is read into a `Task`, with the schema and the combinations that lie beside it, and written again."""

from __future__ import annotations

import os
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.base import storage
from pipeline.base.config import describe
from pipeline.base.errors import UserError
from pipeline.base.yaml_files import read_marked_yaml
from pipeline.task.combinations import read_combination
from pipeline.task.json_schema import content_of, read_schema
from pipeline.task.task import Task
from pipeline.task.values import check_values, typed


def load_task(path: str) -> Task:
    """Reads a task.

    Raises:
        UserError: the file is missing or does not describe a finite task; the message names the key, or the line.
    """
    content, root = read_marked_yaml(path)
    content = _with_schema(content, path)
    for key, listed in _fields_of(root):
        if isinstance(listed, yaml.SequenceNode):
            check_values(path, key.value, listed.value, content["fields"][key.value])
    if isinstance(content.get("combinations"), str):
        content["combinations"] = [_combination(content, path)]
    return make_task(content, path)


def _combination(content: dict[str, Any], path: str) -> dict[str, Any]:
    """What the file that a task names says of its fields."""
    fields = make_task(content | {"combinations": []}, path).fields
    names, rows = read_combination(_beside(path, content["combinations"]), fields)
    values = {
        repr(row): row for row in ([typed(part, fields[name]) for name, part in zip(names, row, strict=True)] for row in rows)
    }
    return {"fields": names, "values": list(values.values())}


def _beside(path: str, named: str) -> str:
    """A file that another one names, beside which it lies."""
    return named if storage.is_uri(named) else os.path.join(path.rpartition("/")[0], named)


def make_task(content: dict[str, Any], source: str) -> Task:
    """A task of some content.

    Raises:
        UserError: it is none; the message names the key.
    """
    try:
        return Task.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{source} does not describe a task:\n{describe(error)}") from error


def _with_schema(content: dict[str, Any], path: str) -> dict[str, Any]:
    """A task's content, with the fields of the schema that it may name in place of its own."""
    if "schema" not in content:
        return content
    if "fields" in content:
        raise UserError(f"{path} has `fields` and a `schema`: one of them says what an answer may be")
    said = content_of(read_schema(_beside(path, str(content.pop("schema")))))
    return content | said | {key: said[key] | content.get(key, {}) for key in ("lists", "format")}


def _fields_of(root: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    return [
        pair for key, node in root.value if key.value == "fields" and isinstance(node, yaml.MappingNode) for pair in node.value
    ]


class _QuotingDumper(yaml.SafeDumper):
    """Quotes every string, so that none reads as something else."""


_QuotingDumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def dump_task(task: Task, short: bool = False) -> str:
    """YAML that `load_task` reads back to the same task; `short` leaves out what every task has by default."""
    content = task.model_dump(mode="json", exclude_defaults=short)
    return yaml.dump(content, Dumper=_QuotingDumper, sort_keys=False)  # in ASCII: PyYAML misreads a NEL of its own
