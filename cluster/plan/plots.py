"""The plots of a plan, as SVG in data URIs."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from cluster.plan.estimate import Estimate
from pipeline.base.plots import INK, STUDENT, svg
from tune.compare.plots import GRID, short_number

COLOURS = {"extract": STUDENT, "train": "#c07a2c"}
SPOT = "#2a7d3f"
WIDTH, HEIGHT = 4.6, 3.2  # inches: small enough to be read on a phone without scrolling
LABELS = 6  # numbers of workers that are written out
MARGIN = 1.6  # around the hours, so that a 1, 2 or 5 is always among them


def wall_plot(plan: Estimate) -> str:
    """Wall time of extraction, of training and in all against workers, all in powers."""
    lines = {name: [point.stage_hours[name] for point in plan.points] for name in COLOURS}
    lines["in all"] = [point.wall_hours for point in plan.points]
    hours = [each for line in lines.values() for each in line]
    with svg(1, WIDTH, HEIGHT) as (drawing, (axes,)):
        for name, line in lines.items():
            axes.plot(_workers(plan), line, "o-", ms=4, color=COLOURS.get(name, INK), label=name)
        axes.set_yscale("log")
        axes.set_ylim(min(hours) / MARGIN, max(hours) * MARGIN)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("wall time, hours (log scale)")
        _axes(axes, _workers(plan))
    return drawing.uri


def cost_plot(plan: Estimate) -> str:
    """Money in all against workers, on demand and spot, from zero."""
    spot = [point.spot_dollars for point in plan.points]
    with svg(1, WIDTH, HEIGHT) as (drawing, (axes,)):
        axes.plot(_workers(plan), [point.dollars for point in plan.points], "o-", ms=4, color=STUDENT, label="on demand")
        axes.plot(_workers(plan), [np.nan if each is None else each for each in spot], "o-", ms=4, color=SPOT, label="spot")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("cost, US dollars")
        _axes(axes, _workers(plan))
    return drawing.uri


def _workers(plan: Estimate) -> list[int]:
    return [max(point.workers.values()) for point in plan.points]


def _axes(axes: Axes, workers: list[int]) -> None:
    axes.set_xscale("log", base=2)
    every = -(-len(workers) // LABELS)
    axes.xaxis.set_major_locator(FixedLocator(workers[::every]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("workers of each stage: GPUs (log scale)")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3)
