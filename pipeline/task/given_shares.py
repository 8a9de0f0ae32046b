"""How likely each value was, as people and programs write it beside an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pipeline.task.task import Task
from pipeline.task.values import Scalar

ROUNDED = 0.02  # that shares of a field may be above 1 together


def fit_shares(task: Task, given: Any) -> list[list[float]]:
    """The share of each value of each field, in the task's order.

    It is a mapping, or its JSON text, of each field to its values' shares: `{"mood": {"good": 0.9}}`, or as `retort predict
    --probabilities` writes it, `{"mood": [{"value": "good", "share": 0.9}]}`; for a single field its name may be left out.
    A value that is no string stands there as its JSON text. What a field's shares leave is spread over the values not named.

    Raises:
        ValueError: it is none of that; with the reason.
    """
    if task.lists:
        raise ValueError(f"{next(iter(task.lists))} is a list, of which shares say too little: give answers alone")
    content = json.loads(given) if isinstance(given, str) else given
    if not isinstance(content, Mapping):
        raise ValueError("it is no object")
    if len(task.fields) == 1 and content.keys() != task.fields.keys():
        content = {next(iter(task.fields)): content}
    if content.keys() != task.fields.keys():
        raise ValueError(f"it is not an object with {' and '.join(task.fields)}")
    return [_field(name, allowed, content[name]) for name, allowed in task.fields.items()]


def _field(name: str, allowed: list[Scalar], given: Any) -> list[float]:
    pairs = list(given.items()) if isinstance(given, Mapping) else [(item["value"], item["share"]) for item in given]
    places = {_text(value): i for i, value in enumerate(allowed)}
    shares: list[float | None] = [None] * len(allowed)
    for value, share in pairs:
        if share is None:  # a column of a table has each key for all rows
            continue
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
            raise ValueError(f"{name}: the share of {value!r:.80} is {share!r:.80}, not from 0 to 1")
        if _text(value) not in places:
            raise ValueError(f"{name}: {value!r:.80} is none of its {len(allowed)} values")
        shares[places[_text(value)]] = float(share)
    known, unknown = math.fsum(share or 0.0 for share in shares), shares.count(None)
    if not 0 < known <= 1 + ROUNDED:
        raise ValueError(f"{name}: its shares are {known:g} together")
    rest = max(0.0, 1 - known) / unknown if unknown else 0.0
    return [(rest if share is None else share) / (known + rest * unknown) for share in shares]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
