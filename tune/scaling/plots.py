"""The plots of scaling, as SVG in data URIs."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pipeline.base.plots import INK, STUDENT, svg
from tune.compare.plots import GRID, short_number
from tune.scaling.results import TARGETS, Line, Stage, targets

COLOURS = (STUDENT, "#c07a2c")  # of a stage's lines
TERMS = {
    "rows": ("the teacher", STUDENT),
    "examples": ("examples", STUDENT),
    "fixed": ("fixed part of a step", "#9db8d6"),
    "sharing": ("sharing a machine", "#c9a45c"),
    "waiting": ("waiting for the slowest", "#8b4a9c"),
    "volume": ("exchange: bytes", "#a8451f"),
    "hops": ("exchange: hops", "#e0917a"),
    "start": ("start-up", "#2a7d3f"),
    "last units": ("idle at the last units", "#8bbf9a"),
    "manifest": ("manifest", "#6b6b6b"),
}
FURTHEST = 1024  # workers a plot shows
WIDTH, HEIGHT = 4.6, 3.2  # inches: small enough to be read on a phone without scrolling


def _counts(line: Line) -> list[int]:
    """Where the model's line is drawn: every eighth of an octave."""
    most = min(line.curve.most or FURTHEST, FURTHEST)
    return sorted({min(most, round(2 ** (i / 8))) for i in range(8 * 10 + 1)})


def throughput(stage: Stage) -> str:
    """Items a second against workers, both in powers; dashed lines are perfectly linear."""
    with svg(1, WIDTH, HEIGHT) as (drawing, (axes,)):
        for line, colour in zip(stage.lines, COLOURS, strict=False):
            counts = _counts(line)
            ideal = [count * line.curve.throughput(1) for count in counts]
            axes.plot(counts, ideal, "--", lw=0.9, color=colour, alpha=0.55)
            axes.plot(counts, [line.curve.throughput(count) for count in counts], lw=1.6, color=colour, label=line.name)
            points = [(row.workers, row.items_per_second) for row in stage.measured if row.line == line.name]
            axes.plot(*zip(*points, strict=True) if points else ([], []), "o", ms=6, color=colour, zorder=4)
            _intervals(axes, line, colour)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel(f"{stage.items} a second (log scale)")
        _worker_axis(axes)
    return drawing.uri


def _intervals(axes: Axes, line: Line, colour: str) -> None:
    """Bars at the extrapolated counts: the middle 90 % of the bootstrap."""
    for row in line.predicted:
        axes.plot([row.workers] * 2, row.items_interval, "-", lw=5, color=colour, alpha=0.3, solid_capstyle="butt")


def _worker_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.9, 1.1 * FURTHEST)
    axes.xaxis.set_major_locator(FixedLocator([1, 2, *TARGETS]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("workers (log scale)")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1))


def shares(stage: Stage, line: Line) -> str:
    """What the workers' time goes into, at counts that were measured and those that were not."""
    counts = sorted({row.workers for row in stage.measured} | set(targets(line.curve)))
    rows = [line.curve.terms(count) for count in counts]
    names = [name for name in rows[0] if any(row[name] > 1e-4 * sum(row.values()) for row in rows)]
    with svg(1, WIDTH, 1.8 + 0.3 * len(counts)) as (drawing, (axes,)):
        left = np.zeros(len(counts))
        for name in names:
            label, colour = TERMS[name]
            widths = np.array([100 * row[name] / sum(row.values()) for row in rows])
            axes.barh(range(len(counts)), widths, 0.72, left, color=colour, label=label)
            _write(axes, left, widths, colour)
            left += widths
        axes.set_yticks(range(len(counts)), [f"{count:,}" for count in counts])
        axes.set_ylim(len(counts) - 0.5, -0.5)
        axes.set_ylabel("workers")
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the time, %")
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, handlelength=1, columnspacing=1)
    return drawing.uri


def _write(axes: Axes, left: np.ndarray, widths: np.ndarray, colour: str) -> None:
    """Numbers in the bars that have room for one."""
    ink = "white" if colour in (STUDENT, "#8b4a9c", "#a8451f", "#2a7d3f", "#6b6b6b") else INK
    for place, (start, width) in enumerate(zip(left, widths, strict=True)):
        if width >= 5:
            axes.text(start + width / 2, place, f"{width:.0f}", ha="center", va="center", fontsize=8, color=ink)


def drawings(stage: Stage) -> list[tuple[str, str, str]]:
    """Title, data URI and note of each plot of a stage."""
    note = "Dots are measured, lines are the model, dashed would be linear; bars are the middle 90 % of a bootstrap."
    shown = [(f"Where the time goes: {line.name}", shares(stage, line), "By the model, at each count.") for line in stage.lines]
    return [("Throughput", throughput(stage), note), *shown]
