"""Which values of some fields go together: an intent, say, and the domain it belongs to."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field, model_validator

from pipeline.base import storage
from pipeline.base.config import Strict
from pipeline.base.errors import UserError, clip
from pipeline.task.values import Scalar


class Combination(Strict):
    """Fields that follow each other, and all that they may be together."""

    fields: list[str] = Field(..., min_length=2)
    values: list[list[Scalar]] = Field(..., min_length=1, description="a value of each field")

    @model_validator(mode="after")
    def _whole(self) -> Combination:
        rows = {repr(row) for row in self.values}
        if any(len(row) != len(self.fields) for row in self.values) or len(rows) < len(self.values):
            raise ValueError(
                f"each of its values is to be {len(self.fields)} different ones for {' and '.join(self.fields)}, once"
            )
        return self


def check_combinations(combinations: Sequence[Combination], fields: Mapping[str, list[Scalar]], lists: Iterable[str]) -> None:
    """Refuses combinations that no task has.

    Raises:
        ValueError: with the reason.
    """
    names, seen = list(fields), set[str]()
    for one in combinations:
        which = " and ".join(map(clip, one.fields))
        if unknown := [name for name in one.fields if name not in fields or name in lists or name in seen]:
            raise ValueError(f"combinations: {clip(unknown[0])} is no field, a list, or in two combinations")
        first = names.index(one.fields[0])
        if names[first : first + len(one.fields)] != one.fields:
            raise ValueError(f"combinations: {which} are to follow each other among the fields, in this order")
        for place, name in enumerate(one.fields):
            told, known = (
                {repr(value): value for value in values} for values in ([row[place] for row in one.values], fields[name])
            )
            if odd := [value for key, value in {**told, **known}.items() if key not in told or key not in known]:
                raise ValueError(
                    f"combinations: {clip(repr(odd[0]))} is no value of {clip(name)}, or in no combination of {which}"
                )
        seen.update(one.fields)


def read_combination(path: str, fields: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """What a CSV file says of the fields that it has columns for; a row may be there again, so a log will do.

    Raises:
        UserError: it has columns for fewer than two.
    """
    reader = csv.DictReader(io.StringIO(storage.read_text(path)))
    names = [name for name in fields if name in (reader.fieldnames or [])]
    if len(names) < 2:
        raise UserError(
            f"{path} has columns for {' and '.join(names) or 'none'} of the fields, and a combination is of two or more"
        )
    return names, [[row[name] for name in names] for row in reader]
