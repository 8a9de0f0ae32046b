"""JSON Schema, and Pydantic models, to a task's fields: whatever allows a finite set of answers.

What is taken is written in docs/tasks.md; all else is refused by its JSON pointer (RFC 6901), so that no answer is left out
or let in by mistake. A member that may be left out is always written where it may be null or has a default.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from jsonschema import Draft202012Validator, SchemaError
from pydantic import BaseModel

from pipeline.base import storage
from pipeline.base.errors import UserError, clip
from pipeline.task.values import Scalar

MARKS = "./:|"  # one of them parts the keys of a field's name where objects nest
MOST_INTEGERS = 1000  # of one member
BOUNDS: dict[str, Callable[[float], int]] = {  # of integers, to the last one that is allowed
    "minimum": math.ceil,
    "maximum": math.floor,
    "exclusiveMinimum": lambda bound: math.floor(bound) + 1,
    "exclusiveMaximum": lambda bound: math.ceil(bound) - 1,
}
IGNORED = {  # what forbids no answer that is written here
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("discriminator", "additionalProperties", "$schema", "$id", "$defs", "definitions"),
}
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}

Schema = dict[str, Any]
Path = tuple[str, ...]


def read_schema(path: str) -> Schema:
    """A schema from a JSON file.

    Raises:
        UserError: there is none.
    """
    try:
        schema = json.loads(storage.read_text(path), parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UserError(f"{path} holds no JSON Schema: an object, with `type` and `properties`")
    return schema


def model_schema(source: str) -> Schema:
    """A Pydantic model's, named `module:Model`. Importing a module runs it, so no file may name one.

    Raises:
        UserError: there is no such module or model.
    """
    module, _, name = source.partition(":")
    sys.path.insert(0, "")  # as `python -m` has it
    try:
        model = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot import {module}: {error}") from error
    finally:
        sys.path.remove("")
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise UserError(f"{module} has no Pydantic model {name}")
    return model.model_json_schema()


def content_of(schema: Schema) -> dict[str, Any]:
    """What a task says of a schema's answers: `fields`, `lists`, `optional`, `combinations`, and in `format` what parts keys.

    Raises:
        UserError: it allows answers without end, or uses what a task cannot say; naming the place.
    """
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        _refuse("".join(f"/{key}" for key in error.absolute_path), f"is none: {clip(error.message)}")
    reader = _Reader(schema)
    paths, together = reader.answers(schema)
    flat = all(len(path) == 1 for path in paths)
    mark = None if flat else next((mark for mark in MARKS if not any(mark in key for path in paths for key in path)), None)
    if mark is None and not flat:
        raise UserError(f"the schema's keys hold all of {' '.join(MARKS)}, one of which is to part them: rename some")
    return {
        "fields": {(mark or "").join(path): values for path, values in paths.items()},
        "lists": {(mark or "").join(path): rule for path, rule in reader.lists.items()},
        "optional": [(mark or "").join(path) for path in paths if path in reader.optional],
        "combinations": [
            {
                "fields": [(mark or "").join(path) for path in list(paths)[together.start : together.stop]],
                "values": together.values,
            }
        ]
        if together
        else [],
        "format": {"nesting": mark},
    }


def _refuse(pointer: str, why: str) -> NoReturn:
    raise UserError(f"the schema at {pointer or 'its root'} {why}")


class _Together(NamedTuple):
    """Values of some fields that go together: from the `start`-th to before the `stop`-th."""

    start: int
    stop: int
    values: list[list[Scalar]]


class _Reader:
    """Reads one schema; `root` is what its references point into.

    Attributes:
        lists: the bounds of the members that are lists.
        optional: the members that an answer may lack; null among their values says so.
    """

    def __init__(self, root: Schema) -> None:
        self._root, self._open = root, list[str]()  # the places that are being read, one inside the other
        self.lists: dict[Path, dict[str, int]] = {}
        self.optional = set[Path]()

    def answers(self, schema: Any) -> tuple[dict[Path, list[Scalar]], _Together | None]:
        """The members of all answers; where a schema is one of several, with what goes together of those that differ."""
        schema, pointer = self._resolved(schema, "")
        key = next((key for key in ("anyOf", "oneOf") if key in schema), None)
        if key is None or "properties" in schema:
            return dict(self.leaves(schema, pointer, ())), None
        self._known(schema, pointer, {key, "type"})
        each = [dict(self.leaves(part, f"{pointer}/{key}/{i}", ())) for i, part in enumerate(schema[key])]
        if any(list(one) != list(each[0]) for one in each):
            _refuse(f"{pointer}/{key}", "has members of other names or another order: let all have the same")
        paths = {path: _unlike([value for one in each for value in one[path]]) for path in each[0]}
        apart = [place for place, path in enumerate(paths) if any(one[path] != each[0][path] for one in each)]
        if len(each) == 1 or (key == "anyOf" and not apart):
            return paths, None
        apart = apart or [0]
        start = max(0, min(apart[0], len(paths) - 2))
        stop = max(apart[-1] + 1, start + 2)
        inside = list(paths)[start:stop]
        if listed := [path for path in inside if path in self.lists]:
            _refuse(f"{pointer}/{key}", f"has lists that differ, or stand between what does: {'.'.join(listed[0])}")
        if left_out := [path for path in inside if path in self.optional]:
            _refuse(f"{pointer}/{key}", f"differs in what may be left out: list {'.'.join(left_out[0])} in `required`")
        times = Counter(json.dumps(row) for one in each for row in itertools.product(*(one[path] for path in inside)))
        rows = [json.loads(row) for row, count in times.items() if key == "anyOf" or count == 1]
        if not rows:
            _refuse(f"{pointer}/{key}", "allows nothing")
        paths |= {path: _unlike([row[i] for row in rows]) for i, path in enumerate(inside)}
        return paths, _Together(start, stop, rows) if len(inside) > 1 else None

    def leaves(self, schema: Any, pointer: str, path: Path) -> Iterator[tuple[Path, list[Scalar]]]:
        """The members of an object with their values, those of objects inside it too."""
        schema, pointer = self._resolved(schema, pointer)
        if schema.get("type") != "object" or not schema.get("properties"):
            _refuse(pointer, "is to be an object with `properties`: an answer is one JSON object")
        self._known(schema, pointer, {"type", "properties", "required"})
        required = schema.get("required", [])
        self._enter(pointer)
        for name, member in schema["properties"].items():
            place = f"{pointer}/properties/{name.replace('~', '~0').replace('/', '~1')}"
            inner, target = self._resolved(member, place)
            if inner.get("type") == "object":
                if name not in required:
                    _refuse(place, "is an object that may be left out, which no task can say: list it in `required`")
                yield from self.leaves(inner, target, (*path, name))
                continue
            values = self._labels(inner, target, (*path, name)) if inner.get("type") == "array" else self.values(inner, target)
            values = _unlike(values)
            if not values:
                _refuse(target, "allows nothing")
            if name not in required and None not in values and "default" not in inner:
                if (*path, name) in self.lists:
                    _refuse(place, "is a list that may be left out: list it in `required`; it may be empty")
                self.optional.add((*path, name))
                values = [*values, None]
            yield (*path, name), values
        if all((*path, name) in self.optional for name in schema["properties"]):
            _refuse(pointer, "may be empty: list a member in `required`")
        self._open.pop()

    def _labels(self, schema: Schema, pointer: str, path: Path) -> list[Scalar]:
        """What may be in a list, each at most once: as a set, whether the schema says so or not."""
        self._known(schema, pointer, {"type", "items", "minItems", "maxItems", "uniqueItems"})
        if "items" not in schema:
            _refuse(pointer, "is a list of anything: say in `items` what may be in it")
        bounds = {bound: schema[key] for bound, key in (("min", "minItems"), ("max", "maxItems")) if key in schema}
        if bounds.get("max") == 0:
            _refuse(pointer, "is always empty: leave it out")
        self.lists[path] = bounds
        return self.values(schema["items"], f"{pointer}/items")

    def values(self, schema: Any, pointer: str) -> list[Scalar]:
        """All that one member may be."""
        schema, pointer = self._resolved(schema, pointer)
        if one_of := next((key for key in ("anyOf", "oneOf") if key in schema), None):
            self._known(schema, pointer, {one_of})
            self._enter(pointer)
            parts = [_unlike(self.values(part, f"{pointer}/{one_of}/{i}")) for i, part in enumerate(schema[one_of])]
            self._open.pop()
            times = Counter(json.dumps(value) for part in parts for value in part)
            return [value for part in parts for value in part if one_of == "anyOf" or times[json.dumps(value)] == 1]
        kinds = schema.get("type", list(TYPES))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if "enum" in schema or "const" in schema:
            self._known(schema, pointer, {"enum", "const", "type"})
            listed = [schema["const"]] if "const" in schema else schema["enum"]
            allowed = tuple(type_ for kind in kinds for type_ in TYPES.get(kind, ()))
            if nested := [value for value in listed if isinstance(value, dict | list)]:
                _refuse(pointer, f"lists {clip(json.dumps(nested[0]))}: a value is a string, a number, true, false or null")
            return [value for value in listed if type(value) in allowed]
        return [value for kind in kinds for value in self._of_type(kind, schema, pointer)]

    def _of_type(self, kind: str, schema: Schema, pointer: str) -> list[Scalar]:
        if kind == "integer":
            return self._integers(schema, pointer)
        if kind in ("boolean", "null"):
            self._known(schema, pointer, {"type", "multipleOf", *BOUNDS})
            return [True, False] if kind == "boolean" else [None]
        if kind == "array":
            _refuse(pointer, "is a list inside a list, or among other things, which no task can say: let it be a list alone")
        if kind == "object":
            _refuse(pointer, "is an object among other things, which no task can say: let it be an object alone, or null")
        _refuse(pointer, "has no end of values, and only a finite set can be distilled: list them in `enum`")

    def _integers(self, schema: Schema, pointer: str) -> list[Scalar]:
        """Between the bounds, by steps of `multipleOf`."""
        self._known(schema, pointer, {"type", "multipleOf", *BOUNDS})
        given = {key: schema[key] for key in BOUNDS if key in schema and math.isfinite(schema[key])}
        step = schema.get("multipleOf", 1)
        ends = {key: BOUNDS[key](bound) for key, bound in given.items()}
        lows, highs = ([end for key, end in ends.items() if key.endswith(side)] for side in ("inimum", "aximum"))
        if not lows or not highs:
            _refuse(pointer, "has no end of integers: give it `minimum` and `maximum`")
        if min(highs) - max(lows) >= MOST_INTEGERS:
            _refuse(pointer, f"spans {max(lows)} to {min(highs)}: {MOST_INTEGERS:,} integers at most")
        return [number for number in range(max(lows), min(highs) + 1) if number % step == 0]

    def _enter(self, pointer: str) -> None:
        if pointer in self._open:
            _refuse(pointer, "holds itself: it allows answers without end")
        self._open.append(pointer)

    def _resolved(self, schema: Any, pointer: str) -> tuple[Schema, str]:
        """A schema that refers to nothing, and where it stands."""
        seen = {pointer}
        while isinstance(schema, dict) and (reference := self._reference(schema, pointer)):
            if reference[1] in seen:
                _refuse(pointer, "refers to itself: it allows answers without end")
            beside = {key: value for key, value in schema.items() if key in IGNORED}
            schema, pointer = reference
            schema = schema | beside if isinstance(schema, dict) else schema
            seen.add(pointer)
        if not isinstance(schema, dict):
            _refuse(pointer, "allows anything or nothing: say what it may be")
        return schema, pointer

    def _reference(self, schema: Schema, pointer: str) -> tuple[Any, str] | None:
        """What a schema stands for, if for another one."""
        if len(some := schema.get("allOf", [])) == 1 and not schema.keys() - IGNORED - {"allOf"}:
            return some[0], f"{pointer}/allOf/0"  # so Pydantic writes a reference with a title beside it
        if "$ref" not in schema:
            return None
        self._known(schema, pointer, {"$ref"})
        target = schema["$ref"]
        if not target.startswith("#/"):
            _refuse(pointer, f"refers to {clip(target)!r}, which is not inside this schema: put it under $defs")
        found: Any = self._root
        for key in target[2:].split("/"):
            found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if found is None:
            _refuse(pointer, f"refers to {clip(target)!r}, where nothing is")
        return found, target[1:]

    def _known(self, schema: Schema, pointer: str, keys: set[str]) -> None:
        """Refuses keywords that would change what is allowed."""
        if others := sorted(schema.keys() - IGNORED - keys):
            _refuse(pointer, f"says {clip(others[0])!r}, which no task can say: leave it out if it forbids none of the answers")


def _unlike(values: list[Scalar]) -> list[Scalar]:
    """Each value once, in their order; JSON tells true from 1."""
    return list({json.dumps(value): value for value in values}.values())
