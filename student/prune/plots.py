"""The pruning page's plots, as SVG in data URIs.

Shape suffixes as in `student.prune.importance`, and: U units, S sets of units that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from pipeline.base.plots import INK, PLAIN, STUDENT, TRAIN, svg
from student.prune.importance import Array

CUT = "#a8451f"
WORTH = LinearSegmentedColormap.from_list("worth", ["#f7f9fc", TRAIN, STUDENT])
DEPTH = LinearSegmentedColormap.from_list("depth", ["#e0b050", "#c0508a", "#1f3a78"])
POINTS = 200  # of a curve
LEAST = 0.01  # share of the mean below which a curve goes no further down
LINEAR_TO, CURVES_TO = 30, 10  # spreads up to which bars and curves are drawn to a linear scale

GROUPED = FuncFormatter(lambda value, _: f"{value:,.0f}")


def relative(values_SU: Array) -> Array:
    """Importance as a multiple of the mean of its set; zeros where that is zero."""
    mean_S1 = values_SU.mean(axis=1, keepdims=True)
    return np.divide(values_SU, mean_S1, out=np.zeros_like(values_SU), where=mean_S1 > 0)


def layer_bars(values_L: Array, kept: Sequence[int], title: str) -> str:
    """What layers are worth, those that were cut in a paler colour."""
    stays = set(kept)
    with svg(1, 4.1, 2.7) as (drawing, (axes,)):
        axes.bar(range(len(values_L)), values_L, 0.8, color=[STUDENT if i in stays else TRAIN for i in range(len(values_L))])
        axes.axhline(0, lw=0.8, color=INK)
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_xticks(_some(len(values_L), 8))
        axes.set_xlim(-0.7, len(values_L) - 0.3)
        _bar_scale(axes, values_L)
    return drawing.uri


def _bar_scale(axes: Axes, values_L: Array) -> None:
    """Logarithmic away from zero where one bar would flatten the others: they may be negative."""
    sizes = np.abs(values_L[values_L != 0])
    if not len(sizes) or sizes.max() <= LINEAR_TO * np.median(sizes):
        return
    low = max(np.quantile(sizes, 0.1), sizes.max() / 1e4)
    axes.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(low)))
    axes.set_ylim(min(2 * values_L.min(), 0), max(2 * values_L.max(), 0))
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("log scale away from 0")


def _some(count: int, most: int) -> range:
    """At most `most` of the indices below `count`, evenly spread."""
    return range(0, count, -(-count // most))


def head_map(heads_LH: Array, layers: Sequence[int], heads: Sequence[Sequence[int]]) -> str:
    """What heads are worth beside the mean of their layer, with marks on those that were cut."""
    worth_LH = relative(heads_LH)
    depth, count = worth_LH.shape
    with svg(1, 5.6, float(np.clip(1.2 + 0.26 * depth, 2.2, 8))) as (drawing, (axes,)):
        mesh = axes.pcolormesh(worth_LH, cmap=WORTH, norm=_spread(worth_LH), edgecolors="white", linewidth=0.4)
        _cross_out(axes, heads_LH.shape, dict(zip(layers, heads, strict=True)))
        axes.set_ylim(depth, 0)
        _index_ticks(axes, depth, count)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.figure.colorbar(mesh, ax=axes, label="× mean of the layer", format=PLAIN)
    return drawing.uri


def _spread(values_SU: Array) -> Normalize:
    low, high = float(values_SU.min()), float(values_SU.max())
    return Normalize(low, high) if high - low > 1e-6 else Normalize(low - 0.1, high + 0.1)


def _cross_out(axes: Axes, shape: tuple[int, ...], kept: dict[int, Sequence[int]]) -> None:
    """Crosses on heads that were cut, a line through layers that were."""
    depth, count = shape
    gone = np.ones(shape, bool)
    for layer, heads in kept.items():
        gone[layer, list(heads)] = False
    whole = [layer for layer in range(depth) if layer not in kept]
    gone[whole] = False
    y, x = np.nonzero(gone)
    size = float(np.clip(200 / max(count, depth), 2.5, 7))
    axes.plot(x + 0.5, y + 0.5, "x", ms=size, mew=size / 5, color=CUT)
    axes.hlines(np.array(whole) + 0.5, 0.1, count - 0.1, color=CUT, lw=size / 5)


def _index_ticks(axes: Axes, depth: int, count: int) -> None:
    """Indices below the middle of cells, not all where there are many."""
    columns, rows = _some(count, 16), _some(depth, 32)
    axes.set_xticks([i + 0.5 for i in columns], [str(i) for i in columns])
    axes.set_yticks([i + 0.5 for i in rows], [str(i) for i in rows])
    axes.tick_params(length=0)


def neuron_curves(neurons_LF: Array, stay: int, kept: Sequence[int]) -> str:
    """Neurons of each layer by falling importance beside the layer's mean; layers that were cut are dotted."""
    depth, stays = len(neurons_LF), set(kept)
    colours = DEPTH.resampled(depth)
    with svg(1, 5.6, 3.4) as (drawing, (axes,)):
        for layer, (x, y) in enumerate(_falling(neurons_LF)):
            style = "-" if layer in stays else ":"
            axes.plot(x, y, style, marker=_marker(x), ms=4, lw=1.4 if depth <= 16 else 0.9, color=colours(layer))
        _curve_axes(axes, neurons_LF, stay, "neurons of a layer, the most important first", "× mean of the layer")
        scale = ScalarMappable(Normalize(-0.5, depth - 0.5), colours)
        axes.figure.colorbar(scale, ax=axes, label="layer", ticks=list(_some(depth, 8)))
    return drawing.uri


def channel_curve(channels_D: Array, stay: int) -> str:
    """Channels by falling importance beside their mean; `stay` of them were kept."""
    with svg(1, 5.6, 3.0) as (drawing, (axes,)):
        for x, y in _falling(channels_D[None]):
            axes.plot(x, y, marker=_marker(x), ms=4, lw=1.6, color=STUDENT)
        _curve_axes(axes, channels_D[None], stay, "channels, the most important first", "× mean of the channels")
    return drawing.uri


def _marker(x: NDArray[np.int64]) -> str:
    """Dots where units are few: a single one makes no line."""
    return "o" if len(x) <= 16 else ""


def _falling(values_SU: Array) -> list[tuple[NDArray[np.int64], Array]]:
    """Ranks from 1 and relative importance of each set, in at most POINTS points."""
    sorted_SU = np.maximum(-np.sort(-relative(values_SU), axis=1), LEAST)
    at = thinned(values_SU.shape[1])
    return [(at + 1, row_U[at]) for row_U in sorted_SU]


def thinned(count: int) -> NDArray[np.int64]:
    """At most POINTS of the indices below `count`, with the first and the last, denser at the start, where curves are steep."""
    if count <= POINTS:
        return np.arange(count)
    half = POINTS // 2
    indices = np.concatenate([np.linspace(0, count - 1, half), np.geomspace(1, count, half) - 1])
    return np.unique(indices.round().astype(np.int64))


def _curve_axes(axes: Axes, values_SU: Array, stay: int, units: str, worth: str) -> None:
    count, worth_SU = values_SU.shape[1], np.maximum(relative(values_SU), LEAST)
    if worth_SU.max() > CURVES_TO * worth_SU.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1.0,) if worth_SU.max() > 300 * worth_SU.min() else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.05 * worth_SU.max())
    margin = max(0.01 * count, 0.5)
    axes.set_xlim(1 - margin, count + margin)
    axes.xaxis.set_major_locator(FixedLocator([1]) if count == 1 else MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(GROUPED)
    axes.set_xlabel(units)
    axes.set_ylabel(worth)
    if stay < count:
        _cut_line(axes, stay, count)


def _cut_line(axes: Axes, stay: int, count: int) -> None:
    """Where the cut is, named above the plot, where no curve is in the way."""
    axes.axvline(stay + 0.5, ls="--", lw=1.2, color=CUT)
    side = "left" if stay < count / 5 else "right" if stay > 4 * count / 5 else "center"
    axes.text(
        stay + 0.5, 1.02, f"{stay:,} of {count:,} kept", transform=axes.get_xaxis_transform(), ha=side, color=CUT, fontsize=9
    )
