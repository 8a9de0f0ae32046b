"""The answers of an API that are paid for and not yet in a shard: a small file each, there before anything else is done."""

from __future__ import annotations

import re
from typing import Any

from pipeline.base import storage

Place = tuple[int, int]  # row in its unit, and sample


class Journal:
    """The files of one run. A unit's are deleted once its shard is there."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def write(self, unit: int, place: Place, record: dict[str, Any]) -> None:
        """Keeps one answer."""
        storage.write_json(self._path(unit, place), record)

    def read(self, unit: int) -> dict[Place, dict[str, Any]]:
        """A unit's answers that there are."""
        names = (re.fullmatch(r"(\d+)-(\d+)\.json", name) for name in storage.list_files(self._unit(unit)))
        places = sorted((int(name[1]), int(name[2])) for name in names if name)
        return {place: storage.read_json(self._path(unit, place)) for place in places}

    def delete(self, unit: int) -> None:
        """A unit's answers."""
        storage.delete(self._unit(unit))

    def _unit(self, unit: int) -> str:
        return storage.join(self._folder, f"unit-{unit:06d}")

    def _path(self, unit: int, place: Place) -> str:
        return storage.join(self._unit(unit), f"{place[0]:06d}-{place[1]:04d}.json")
