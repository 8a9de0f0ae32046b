"""The pruning page's plots, as SVG in data URIs.

Shape suffixes as in `student.prune.importance`, and: U units, S sets of units that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.base.plots import INK, PLAIN, STUDENT, TRAIN, svg
from student.prune.importance import Array

CUT = "#a8451f"
POINTS = 200  # of a curve
LEAST = 0.01  # share of the mean below which a curve goes no further down
LINEAR_TO = 10  # spreads up to which bars and curves are drawn to a linear scale


def relative(values_SU: Array) -> Array:
    """Importance as a multiple of the mean of its set; zeros where that is zero."""
    mean_S1 = values_SU.mean(axis=1, keepdims=True)
    return np.divide(values_SU, mean_S1, out=np.zeros_like(values_SU), where=mean_S1 > 0)


def layer_bars(values_L: Array, kept: Sequence[int], title: str) -> str:
    """What layers are worth, those that were cut in a paler colour."""
    stays, sizes = set(kept), np.abs(values_L[values_L != 0])
    with svg(1, 4.1, 2.7) as (drawing, (axes,)):
        axes.bar(range(len(values_L)), values_L, 0.8, color=[STUDENT if i in stays else TRAIN for i in range(len(values_L))])
        axes.axhline(0, lw=0.8, color=INK)
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if len(sizes) and sizes.max() > LINEAR_TO * np.median(sizes):  # one bar would flatten the others; they may be negative
            axes.set_yscale("symlog", linthresh=max(np.quantile(sizes, 0.1), sizes.max() / 1e4))
            axes.set_ylabel("log scale away from 0")
    return drawing.uri


def head_map(heads_LH: Array, layers: Sequence[int], heads: Sequence[Sequence[int]]) -> str:
    """What heads are worth beside the mean of their layer, with crosses on those that were cut."""
    worth_LH, gone_LH = relative(heads_LH), np.ones(heads_LH.shape, bool)
    for layer, stay in zip(layers, heads, strict=True):
        gone_LH[layer, list(stay)] = False
    with svg(1, 5.6, float(np.clip(1.2 + 0.26 * len(heads_LH), 2.2, 8))) as (drawing, (axes,)):
        image = axes.imshow(worth_LH, cmap="Blues", aspect="auto", vmin=0, vmax=max(float(worth_LH.max()), 1e-9))
        y, x = np.nonzero(gone_LH)
        axes.plot(x, y, "x", ms=5, mew=1, color=CUT)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(16, integer=True))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.figure.colorbar(image, ax=axes, label="× mean of the layer", format=PLAIN)
    return drawing.uri


def curves(values_SU: Array, stay: int, units: str, labels: Sequence[str] = ()) -> str:
    """Units of each set by falling importance beside the set's mean; `stay` of each were kept."""
    count, worth_SU = values_SU.shape[1], np.maximum(-np.sort(-relative(values_SU), axis=1), LEAST)
    at = thinned(count)
    with svg(1, 5.6, 3.2) as (drawing, (axes,)):
        for i, worth_U in enumerate(worth_SU):
            label = labels[i] if labels else None
            axes.plot(at + 1, worth_U[at], "o-" if count <= 16 else "-", ms=4, lw=1.4, alpha=0.8, label=label)
        if worth_SU.max() > LINEAR_TO * worth_SU.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(f"{units}, the most important first")
        axes.set_ylabel("× mean")
        _mark_cut(axes, stay, count)
        if 1 < len(labels) <= 12:
            axes.legend(fontsize=8, title="layer", loc="upper left", bbox_to_anchor=(1.01, 1))
    return drawing.uri


def _mark_cut(axes: Axes, stay: int, count: int) -> None:
    """Where the cut is, named above the plot, where no curve is in the way."""
    if stay < count:
        axes.axvline(stay + 0.5, ls="--", lw=1.2, color=CUT)
        place = axes.get_xaxis_transform()
        axes.text(stay + 0.5, 1.02, f"{stay:,} of {count:,} kept", transform=place, ha="center", color=CUT, fontsize=9)


def thinned(count: int) -> NDArray[np.int64]:
    """At most POINTS of the indices below `count`, with the first and the last, denser at the start, where curves are steep."""
    if count <= POINTS:
        return np.arange(count)
    half = POINTS // 2
    indices = np.concatenate([np.linspace(0, count - 1, half), np.geomspace(1, count, half) - 1])
    return np.unique(indices.round().astype(np.int64))
