"""The comparison as a table: the same cells on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tune.compare.grouping import PARAMETERS, WHOLE, Group, Spread, fields_of
from tune.compare.verdict import count

MISSING = "–"
COSTS = {"GPU s": "cost/gpu_seconds", "worker s": "cost/worker_seconds"}  # the second where no GPU was used

Cell = Callable[[Group], str]


def columns(groups: Sequence[Group]) -> dict[str, Cell]:
    """What the table shows of a group, by heading; a measure of fidelity over several seeds is mean ± standard deviation."""
    heads: dict[str, Cell] = {"seeds": lambda group: str(len(group.runs)), "whole, %": _cell(WHOLE, 100, 1)}
    heads |= {f"{name}, %": _cell(metric, 100, 1) for metric, name in fields_of(groups).items()}
    return (
        heads
        | {
            "ECE": _cell("test/ece", 1, 3),
            "KL, nats": _cell("test/choice_kl", 1, 3),
            "parameters": lambda group: MISSING if (size := group.mean(PARAMETERS)) is None else count(size),
            "answers/s": _mean("speed/answers_per_second", 0),
            "latency, ms": _mean("speed/latency_ms", 1),
        }
        | _cost(groups)
    )


def _cell(metric: str, scale: float, digits: int) -> Cell:
    return lambda group: shown(group.spread(metric), scale, digits)


def _mean(metric: str, digits: int) -> Cell:
    """A speed varies with the machine, not with the seed."""
    return lambda group: MISSING if (mean := group.mean(metric)) is None else f"{mean:,.{digits}f}"


def shown(spread: Spread | None, scale: float, digits: int) -> str:
    """A spread in so many digits after the point."""
    if spread is None:
        return MISSING
    mean = f"{scale * spread.mean:,.{digits}f}"
    return mean if spread.std is None else f"{mean} ± {scale * spread.std:,.{digits}f}"


def _cost(groups: Sequence[Group]) -> dict[str, Cell]:
    """One column; its heading has the unit where all students share one."""
    units = {unit for group in groups if (unit := _unit(group))}
    if len(units) == 1:
        (unit,) = units
        return {unit: _mean(COSTS[unit], 0)}
    return {"cost": _mixed_cost}


def _mixed_cost(group: Group) -> str:
    unit = _unit(group)
    return f"{group.mean(COSTS[unit]):,.0f} {unit}" if unit else MISSING


def _unit(group: Group) -> str | None:
    return next((unit for unit, metric in COSTS.items() if group.mean(metric)), None)
