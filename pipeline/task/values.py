"""The values that a field may have: what they are in YAML, in JSON, and in the files that people have."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml

from pipeline.base.errors import UserError, clip

Scalar = bool | int | float | str | None
Value = Scalar | tuple[Scalar, ...]  # the latter of a list, in the task's order
Values = tuple[Value, ...]


def dumps(value: Scalar) -> str:
    """A value's JSON text."""
    return json.dumps(value, ensure_ascii=False)


def written(value: Any) -> str:
    """A value as a part of a text: null is nothing, and what is no string is written as JSON has it."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def labels_of(value: Value) -> tuple[Scalar, ...]:
    """The labels of a list; of another field its value alone."""
    return value if isinstance(value, tuple) else (value,)


def typed(value: object, allowed: list[Scalar]) -> object:
    """A value that is no string, from its text in a CSV file: pandas writes True, JSON true."""
    if not isinstance(value, str) or value in allowed:
        return value
    return next((other for other in allowed if not isinstance(other, str) and value.strip().lower() == dumps(other)), value)


def is_among(value: object, allowed: Iterable[Any]) -> bool:
    """Whether a value is one of some; JSON tells true from 1."""
    return any(type(value) is type(other) and value == other for other in allowed)


def finite_values(name: str, spec: Any) -> list[Any]:
    """The values of one field: listed, or spelt out from `{type: boolean}` or a bounded `{type: integer}`."""
    if isinstance(spec, dict):
        spec = _typed_values(name, spec)
    if not isinstance(spec, list) or not spec:
        raise ValueError(f"field {name!r} must list its values, at least one")
    for value in spec:
        if not _is_scalar(value):
            raise ValueError(f"field {name!r}: {clip(repr(value))} is not a string, number, true, false or null")
    texts = [json.dumps(value) for value in spec]
    twice = sorted(text for text, count in Counter(texts).items() if count > 1)
    if twice:
        raise ValueError(f"field {name!r} lists {clip(', '.join(twice))} twice")
    return spec


def _is_scalar(value: object) -> bool:
    """Whether JSON can write it. YAML also knows dates, not-a-number and strings with half a character."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _typed_values(name: str, spec: dict[str, Any]) -> list[Any]:
    kind, bounds = spec.get("type"), {key: spec[key] for key in spec if key != "type"}
    if kind == "boolean" and not bounds:
        return [True, False]
    if kind == "integer" and set(bounds) == {"minimum", "maximum"} and all(type(b) is int for b in bounds.values()):
        if not 0 <= bounds["maximum"] - bounds["minimum"] < 1000:
            raise ValueError(f"field {name!r} spans {bounds['minimum']} to {bounds['maximum']}: 1 to 1000 values at most")
        return list(range(bounds["minimum"], bounds["maximum"] + 1))
    raise ValueError(
        f"field {name!r} is not finite: {clip(repr(spec))} allows answers without end, and only a finite set of answers "
        "can be distilled. List the values, or write {type: boolean} or {type: integer, minimum: …, maximum: …}"
    )


def check_values(path: str, name: str, nodes: list[yaml.Node], values: list[Scalar]) -> None:
    """Refuses values that YAML and JSON read differently, and unquoted strings beside booleans or numbers.

    Answers are JSON, so a value such as `yes`, which YAML takes for true, would fit no answer that says "yes".

    Raises:
        UserError: naming the line, the value, and what to write instead.
    """
    unquoted = [(node, value) for node, value in zip(nodes, values, strict=True) if getattr(node, "style", "") is None]
    strings = [repr(clip(value, 20)) for _, value in unquoted if isinstance(value, str)]
    beside = f" beside the strings {', '.join(strings[:3])}{', …' * (len(strings) > 3)}" if strings else ""
    for node, value in unquoted:
        meant = _json_value(node.value, value)
        misread = (type(meant), meant) != (type(value), value)
        if misread or (strings and isinstance(value, int | float)):
            written = f"`{clip(node.value)}`" if node.value else "an empty value"
            strange, other = ("", meant) if isinstance(value, str) else (beside, value)
            instead = f", or {json.dumps(other)} for what JSON calls so" if misread else ", or the strings too"
            raise UserError(
                f"{path}, line {node.start_mark.line + 1}: field {clip(name)!r} lists {written}, which YAML reads as "
                f'{json.dumps(value)}{strange}: write "{clip(node.value)}" in quotes for the string{instead}'
            )


def _json_value(text: str, value: Scalar) -> Scalar:
    """What JSON reads where YAML reads `value`: the text itself where it is no JSON."""
    try:
        return json.loads(text.lower() if value is None or isinstance(value, bool) else text, parse_constant=str)
    except ValueError:
        return text
