"""A search's trials as parallel coordinates: one axis a param that varies, one line a trial, coloured by whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator

from pipeline.base.plots import INK, MAJORITY, svg
from tune.compare.grouping import SEED, WHOLE, short_names, short_value, varying
from tune.compare.plots import AGREEMENT
from tune.compare.runs import StudentRun

WIDE = 10  # ratio of the largest to the smallest value from which an axis may be logarithmic
FEW = 6  # different numbers up to which each is marked
ABSENT = -0.12  # height of trials that do not have the param
BEHIND = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}  # a tick's text, over the lines
AXES = 12  # params shown at most


@dataclass(frozen=True)
class Coordinate:
    """One axis.

    Attributes:
        name: of the param, with the scale where it is logarithmic.
        heights: [N], each trial's place on the axis, 0..1, or `ABSENT`.
        ticks: label by place.
    """

    name: str
    heights: tuple[float, ...]
    ticks: dict[float, str]


def parallel_coordinates(runs: Sequence[StudentRun]) -> str | None:
    """The drawing; None where no param varies or fewer than two trials were measured.

    Params with one value throughout are left out; a param of words has its values as places, one of numbers a scale.
    """
    params = [run.params for run in runs]
    keys = [key for key in varying(params) if key != SEED][:AXES]
    whole = [run.metrics.get(WHOLE) for run in runs]
    if not keys or sum(value is not None for value in whole) < 2:
        return None
    names = short_names(keys, [key for each in params for key in each])
    coordinates = [coordinate(names[key], [each.get(key) for each in params]) for key in keys]
    last, scale = _outcome(whole)
    with svg(1, max(6.6, 1.25 * (len(keys) + 1.6)), 4.2) as (drawing, (axes,)):
        _lines(axes, [*coordinates, last], whole, scale)
        _axes(axes, [*coordinates, last])
        bar = axes.figure.colorbar(ScalarMappable(scale, "viridis_r"), ax=axes, pad=0.01, fraction=0.04)
        bar.set_label(AGREEMENT, fontsize=8)
        bar.outline.set_visible(False)
    return drawing.uri


def coordinate(name: str, values: Sequence[str | None]) -> Coordinate:
    """The axis of a param: logarithmic, linear or by words, as its values are. Nulls are words."""
    given = sorted({value for value in values if value is not None})
    try:
        numbers = [None if value is None else float(value) for value in values]
    except ValueError:
        return _words(name, values, given)
    known = np.array([number for number in numbers if number is not None])
    if not np.isfinite(known).all():
        return _words(name, values, given)
    logarithmic = _is_logarithmic(known)
    low, high = (np.log(known.min()), np.log(known.max())) if logarithmic else (known.min(), known.max())
    span = high - low or 1.0

    def height(number: float) -> float:
        return float(((np.log(number) if logarithmic else number) - low) / span)

    marks = np.unique(known) if len(set(known)) <= FEW else _marks(known.min(), known.max(), logarithmic)
    ticks = {height(mark): short_value(f"{mark:.6g}") for mark in marks}
    heights = tuple(ABSENT if number is None else height(number) for number in numbers)
    return Coordinate(f"{name}\n(log scale)" if logarithmic else name, heights, _with_absent(ticks, heights))


def _words(name: str, values: Sequence[str | None], given: Sequence[str]) -> Coordinate:
    places = {value: i / max(1, len(given) - 1) for i, value in enumerate(given)}
    heights = tuple(ABSENT if value is None else places[value] for value in values)
    return Coordinate(name, heights, _with_absent({place: short_value(value) for value, place in places.items()}, heights))


def _with_absent(ticks: dict[float, str], heights: Sequence[float]) -> dict[float, str]:
    return ticks | ({ABSENT: "not set"} if ABSENT in heights else {})


def _is_logarithmic(known: np.ndarray) -> bool:
    """Whether values of several magnitudes lie more evenly on a logarithmic axis than on a linear one."""
    if known.min() <= 0 or known.max() / known.min() < WIDE:
        return False
    middle = np.median(known)
    linear = (middle - known.min()) / (known.max() - known.min())
    logarithmic = np.log(middle / known.min()) / np.log(known.max() / known.min())
    return bool(abs(logarithmic - 0.5) < abs(linear - 0.5))


def _marks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values between the ends, or the ends where there are not two."""
    locator = LogLocator(10, (1.0, 2.0, 5.0), numticks=20) if logarithmic else MaxNLocator(5)
    marks = [float(mark) for mark in locator.tick_values(low, high) if low <= mark <= high]
    return marks if len(marks) > 1 else [low, high]


def _outcome(whole: Sequence[float | None]) -> tuple[Coordinate, Normalize]:
    """The last axis, which the colours follow; a trial that was not measured has no place on it."""
    known = [100 * value for value in whole if value is not None]
    low, high = min(known), max(known)
    span = high - low or 1.0
    heights = tuple(float("nan") if value is None else (100 * value - low) / span for value in whole)
    ticks = {(mark - low) / span: f"{mark:.4g}" for mark in _marks(low, high, logarithmic=False)}
    return Coordinate("whole, %", heights, ticks), Normalize(low, high if high > low else low + 1)


def _lines(axes: Axes, coordinates: Sequence[Coordinate], whole: Sequence[float | None], scale: Normalize) -> None:
    """Measured trials in colour, the best on top; the others thin, dashed and grey."""
    colours = mpl.colormaps["viridis_r"]
    for i in sorted(range(len(whole)), key=lambda i: whole[i] or 0.0):
        share, heights = whole[i], [each.heights[i] for each in coordinates]
        if share is None:
            _curve(axes, heights[:-1], color=MAJORITY, lw=0.8, ls=(0, (4, 3)))
        else:
            _curve(axes, heights, color=colours(scale(100 * share)), lw=1.5, alpha=0.85)


def _curve(axes: Axes, heights: Sequence[float], **style: Any) -> None:
    """Flat where it crosses an axis, so that lines through one value can be told apart between the axes."""
    points, codes = [(0.0, heights[0])], [Path.MOVETO]
    for x, (left, right) in enumerate(pairwise(heights)):
        points += [(x + 0.4, left), (x + 0.6, right), (x + 1.0, right)]
        codes += [Path.CURVE4] * 3
    axes.add_patch(PathPatch(Path(points, codes), fill=False, **style))


def _axes(axes: Axes, coordinates: Sequence[Coordinate]) -> None:
    axes.set_xlim(-0.25, len(coordinates) - 0.6)
    axes.set_ylim(-0.18, 1.06)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    for x, each in enumerate(coordinates):
        axes.plot([x, x], [min(0, *each.ticks), 1], color=INK, lw=1, zorder=3)
        for place, text in each.ticks.items():
            axes.text(x + 0.03, place, text, fontsize=8, va="center", zorder=4, bbox=BEHIND)
    axes.set_xticks(range(len(coordinates)), [each.name for each in coordinates], fontsize=9)
    axes.tick_params(axis="x", length=0)
