"""Finding the rows that an engine cannot answer: a batch that fails is halved until each of them stands alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline.base.errors import UserError
from pipeline.teacher.process import EngineError

log = logging.getLogger(__name__)

BARREN = 3  # rows that fail alone, one after another with no answer between them: then it is not the rows

Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Isolated(Generic[Result]):
    """What became of a batch.

    Attributes:
        parts: indices of rows answered together, and their result.
        poison: indices of rows that fail alone, and the reason.
    """

    parts: list[tuple[list[int], Result]]
    poison: dict[int, str]


def isolate(run: Callable[[list[Row]], Result], rows: Sequence[Row]) -> Isolated[Result]:
    """Runs all rows together, and apart where that fails.

    A row is given up when it failed alone twice: an engine can also die of something else.

    Args:
        run: answers rows, or raises `EngineError`; the next call gets another engine.

    Raises:
        UserError: no row of several can be answered, so it is not the rows.
    """
    parts: list[tuple[list[int], Result]] = []
    poison: dict[int, str] = {}
    waiting, suspects, barren = [list(range(len(rows)))], set[int](), 0
    while waiting:
        some = waiting.pop()
        try:
            parts.append((some, run([rows[i] for i in some])))
            barren = 0
        except EngineError as failure:
            log.warning("%s row(s) failed: %s", len(some), failure)
            if len(some) > 1:
                waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
            elif some[0] not in suspects:
                suspects.add(some[0])
                waiting.append(some)
            else:
                poison[some[0]], barren = str(failure), barren + 1
                if barren >= BARREN:
                    raise UserError(f"the engine fails on one row after another, the last time so: {failure}") from failure
    return Isolated(sorted(parts), poison)
