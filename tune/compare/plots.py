"""The comparison's plots, as SVG in data URIs. Students bear their number in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.base.plots import INK, PALE, STUDENT, TRAIN, fitted, svg
from student.evaluate.plots import FLOORS
from student.evaluate.verdict import LABELS
from tune.compare.grouping import PARAMETERS, WHOLE, Group, Spread, Unfinished, fields_of
from tune.compare.pareto import Direction, front

STOPPED, BROKEN, QUIET, GRID = "#c07a2c", "#a8451f", "#8a8a8a", "#e6e6e6"
SERIES = (STUDENT, "#2a7d3f", "#8b4a9c", "#3b9b9b", "#c0508a", "#6b6b6b", "#a8892c", "#4a4a9c")
FLOOR_LINES = {f"floor/{name}": (f"floor: {label}", FLOORS[label]) for name, label in LABELS.items()}
NUMBERED = 40  # students up to which those off the front bear their numbers in a scatter
AGREEMENT = "whole-answer agreement, test split, %"
LINE, FIELD_LINE = 30, 18  # characters of a line in a plot, of a student's label and of a field's name
NAMED, LISTED = 9, 12  # students named in a scatter; students shown by field


@dataclass(frozen=True)
class Against:
    """What whole answers are drawn against."""

    metric: str
    name: str
    direction: Direction


SIZE = Against(PARAMETERS, "parameters, embedding included", "min")
SPEED = Against("speed/answers_per_second", "answers a second, many at once", "max")


def scatter(groups: Sequence[Group], against: Against) -> str | None:
    """Whole answers against size or speed, with the Pareto front and the floors; None where nothing was measured."""
    measured = [(group, spread, group.mean(against.metric) or 0.0) for group in groups if (spread := group.spread(WHOLE))]
    known = [row for row in measured if row[2] > 0]
    if not known:
        return None
    x = np.array([size for _, _, size in known])
    y, std = (100 * np.array(column) for column in zip(*((s.mean, s.std or 0.0) for _, s, _ in known), strict=True))
    on_front = front(np.stack([x, y], axis=1), (against.direction, "max"))
    with svg(1, 6.6, 4.2) as (drawing, (axes,)):
        axes.errorbar(x, y, std, fmt="none", ecolor=TRAIN, elinewidth=1.2, zorder=2)
        axes.plot(x[~on_front], y[~on_front], "o", ms=5, color=TRAIN, zorder=3, label="student")
        _front_line(axes, x[on_front], y[on_front], against.direction)
        _log_axis(axes, x)
        _agreement_axis(axes, y - std, y + std)
        _floors(axes, [group for group, _, _ in known], float(y.min()), float(y.max()))
        if len(known) <= NUMBERED:
            _number_points(axes, [(group, x[i], y[i]) for i, (group, _, _) in enumerate(known) if not on_front[i]])
        _name_points(axes, [(group, x[i], y[i]) for i, (group, _, _) in enumerate(known) if on_front[i]], against.direction)
        axes.set_xlabel(f"{against.name} (log scale)")
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, handletextpad=0.5, columnspacing=1.5)
    return drawing.uri


def _front_line(axes: Axes, x: np.ndarray, y: np.ndarray, direction: Direction) -> None:
    """The best that is to be had at each size, or at each speed."""
    order, style = np.argsort(x), "steps-post" if direction == "min" else "steps-pre"
    axes.plot(x[order], y[order], "o-", drawstyle=style, ms=6.5, lw=1, color=STUDENT, zorder=4, label="on the Pareto front")


def _log_axis(axes: Axes, x: np.ndarray) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, as plain numbers."""
    axes.set_xscale("log")
    low, high = x.min(), x.max()
    margin = max((high / low) ** 0.07, 1.15)
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def short_number(value: float) -> str:
    """A tick's number: 400 k, 1.5 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _agreement_axis(axes: Axes, lowest: np.ndarray, highest: np.ndarray) -> None:
    low, high = float(lowest.min()), float(highest.max())
    margin = max(0.08 * (high - low), 0.4)
    axes.set_ylim(low - margin, min(high + margin, 100.5))
    axes.set_ylabel(AGREEMENT)
    axes.grid(axis="y", color=GRID, lw=0.7)
    axes.set_axisbelow(True)


def _floors(axes: Axes, groups: Sequence[Group], low: float, high: float) -> None:
    """Dashed lines; one so far down that the students could not be told apart above it is named in the legend alone."""
    for metric, (name, colour) in FLOOR_LINES.items():
        known = [share for group in groups if (share := group.mean(metric)) is not None]
        if not known:
            continue
        floor = 100 * sum(known) / len(known)
        label = f"{name}, {floor:.1f} %"
        if floor < low - max(2.5 * (high - low), 5):
            axes.plot([], [], " ", label=f"{label}: below the axis")
            continue
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, floor - 0.06 * (top - floor)), max(top, floor + 0.5))
        axes.axhline(floor, ls="--", lw=1.3, color=colour, zorder=1, label=label)


def short(group: Group) -> str:
    """A group's number and what two lines hold of its label."""
    return fitted(f"{group.number}: {group.label}", LINE)


def _name_points(axes: Axes, points: list[tuple[Group, float, float]], direction: Direction) -> None:
    """Numbers on the side of the front where no student is, and beside the plot what they stand for."""
    side, align = (-4, "right") if direction == "min" else (4, "left")
    to_axes, last, raised = axes.transScale + axes.transLimits, np.array([-1.0, -1.0]), 3
    for group, x, y in sorted(points, key=lambda point: point[1]):
        place = to_axes.transform((x, y))
        raised = raised + 10 if np.abs(place - last).max() < 0.05 else 3  # above the number of a point close by
        axes.annotate(
            str(group.number), (x, y), (side, raised), textcoords="offset points", ha=align, va="bottom",
            fontsize=8.5, fontweight="bold", color=STUDENT, zorder=5,
        )  # fmt: skip
        last = place
    names = [short(group) for group, _, _ in sorted(points, key=lambda point: point[0].number)]
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    text = "\n".join(["on the front:", *names[:NAMED], *more])
    axes.text(1.03, 1, text, transform=axes.transAxes, va="top", fontsize=8, linespacing=1.35)


def _number_points(axes: Axes, points: list[tuple[Group, float, float]]) -> None:
    for group, x, y in points:
        axes.annotate(str(group.number), (x, y), (4, -3), textcoords="offset points", va="top", fontsize=7, color=QUIET)


def agreement_by_field(groups: Sequence[Group]) -> str | None:
    """Agreement by output field, a row a student and a dot a field; a bar is the spread over seeds."""
    fields = fields_of(groups)
    known = [group for group in groups if any(group.spread(metric) for metric in fields)][:LISTED]
    if not known:
        return None
    with svg(1, 6.6, 1.35 + 0.37 * len(known)) as (drawing, (axes,)):
        for i, (metric, name) in enumerate({WHOLE: "whole answer", **fields}.items()):
            if not (spreads := [(place, spread) for place, group in enumerate(known) if (spread := group.spread(metric))]):
                continue
            _dots(axes, spreads, name, INK if i == 0 else SERIES[(i - 1) % len(SERIES)], "|" if i == 0 else "o")
        axes.set_yticks(range(len(known)), [short(group) for group in known], fontsize=8)
        axes.set_ylim(len(known) - 0.5, -0.5)
        axes.grid(color=GRID, lw=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel("agreement, test split, %")
        place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "handletextpad": 0.1, "columnspacing": 1}
        axes.legend(handles=axes.lines, fontsize=8, **place)  # left to itself it leaves out names that begin with _
    return drawing.uri


def _dots(axes: Axes, spreads: list[tuple[int, Spread]], name: str, colour: str, marker: str) -> None:
    places = [place for place, _ in spreads]
    mean, std = (100 * np.array(column) for column in zip(*((s.mean, s.std or 0.0) for _, s in spreads), strict=True))
    axes.hlines(places, mean - std, mean + std, color=colour, lw=1.2, alpha=0.5)
    stroke: Any = {"ms": 9, "mew": 1.8} if marker == "|" else {"ms": 5.5, "mew": 0}
    axes.plot(mean, places, marker, color=colour, label=fitted(name, FIELD_LINE), **stroke)


def learning_curves(groups: Sequence[Group], unfinished: Sequence[Unfinished]) -> str | None:
    """Agreement on the validation split by epoch, a line a run; the best students in colours of their own."""
    finished = [(group, run) for group in groups for run in group.runs if run.curve]
    others = [each.run for each in unfinished if each.run.curve]
    if not finished and not others:
        return None
    coloured = dict(zip(dict.fromkeys(group.number for group, _ in finished), SERIES[:5], strict=False))
    with svg(1, 6.6, 3.9) as (drawing, (axes,)):
        for run in others:
            colour = STOPPED if run.state == "stopped" else BROKEN
            axes.plot(*_percent(run.curve), ls="--", lw=1, marker=".", ms=3, color=colour, alpha=0.8, zorder=2)
            axes.plot(*_percent(run.curve[-1:]), "x", ms=6, mew=1.4, color=colour, zorder=2)
        for group, run in reversed(finished):
            colour = coloured.get(group.number, PALE)
            axes.plot(*_percent(run.curve), "o-", ms=2.5, lw=1.4 if group.number in coloured else 0.9, color=colour, zorder=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel("whole-answer agreement, validation, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GRID, lw=0.7)
        axes.legend(handles=_keys(finished, coloured, others), fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return drawing.uri


def _percent(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [epoch for epoch, _ in curve], [100 * share for _, share in curve]


def _keys(finished: list[Any], coloured: dict[int, str], others: list[Any]) -> list[Line2D]:
    named = {group.number: short(group) for group, _ in finished}
    keys = [Line2D([], [], color=colour, marker="o", ms=3, label=named[number]) for number, colour in coloured.items()]
    if len(named) > len(coloured):
        keys.append(Line2D([], [], color=PALE, marker="o", ms=3, label="other finished students"))
    for name, colour, mine in (("stopped early", STOPPED, True), ("failed, interrupted or running", BROKEN, False)):
        if any((run.state == "stopped") is mine for run in others):
            keys.append(Line2D([], [], color=colour, ls="--", marker="x", ms=5, label=name))
    return keys
