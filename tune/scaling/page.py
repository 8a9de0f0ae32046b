"""Scaling for people: tables and sentences for the terminal, and one self-contained HTML page with its plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.table import Table

from pipeline.base import page
from pipeline.base.page import percent
from pipeline.base.plots import INK, STUDENT, svg
from tune.compare.plots import GRID, short_number
from tune.scaling.results import TARGETS, TERMS, Figures, Line, Result, Stage, targets

COLOURS = (STUDENT, "#c07a2c")  # of a stage's lines
DARK = {TERMS[name][1] for name in ("rows", "examples", "waiting", "volume", "start", "manifest")}  # under white numbers
FURTHEST = 1024  # workers a plot shows
WIDTH, HEIGHT = 4.6, 3.2  # inches: small enough to be read on a phone without scrolling


def render(result: Result) -> str:
    """The page."""
    return page.render(__file__, "page.html.jinja", result=result, drawings=drawings, sections=sections, value=value)


def tables(result: Result) -> list[Table]:
    """Measured and extrapolated rows for the terminal."""
    return [
        page.table(f"{line.name}: {what}", rows)
        for stage in result.stages
        for line in stage.lines
        for what, rows in sections(stage, line)
    ]


def notes(result: Result) -> list[str]:
    """Where each line stops being linear, and what of it is assumed."""
    lines = [line.sentence() for stage in result.stages for line in stage.lines]
    for stage in result.stages:
        assumed = [f"{each['name']} {value(each)}" for each in stage.parameters if each["source"] == "assumed"]
        lines += [f"assumed, not measured: {'; '.join(assumed)}"] if assumed else []
    return lines + ([f"warning: {warning}"] if (warning := result.disturbed()) else [])


def sections(stage: Stage, line: Line) -> list[tuple[str, list[dict[str, str]]]]:
    """What kind of rows a line has, and their cells by heading."""
    measured = [_measured(stage, row) for row in line.measured]
    predicted = [_predicted(stage, row) for row in line.predicted]
    return [(what, rows) for what, rows in (("measured", measured), ("extrapolated", predicted)) if rows]


def number(figure: float) -> str:
    """Three digits, or all before the point."""
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"


def value(parameter: Figures) -> str:
    """A parameter with its interval."""
    spread = f" ({_range(number, parameter['interval'])})" if parameter["interval"] else ""
    return f"{number(parameter['value'])}{spread} {parameter['unit']}"


def _range(show: Callable[[float], str], interval: tuple[float, float]) -> str:
    return " to ".join(map(show, interval))


def _measured(stage: Stage, row: Figures) -> dict[str, str]:
    cells = {
        "workers": f"{row['workers']:,}",
        "machines": f"{row['nodes']:,}",
        f"{stage.items}/s": number(row["items_per_second"]),
        "a worker": number(row["items_per_second"] / row["workers"]),
        "efficiency": percent(row["efficiency"]),
        "start-up, s": number(row["startup"]),
    }
    if stage.name == "train":
        cells["exchange"] = percent(row["communication_share"])
        cells["MB sent a step"] = number(row["bytes_sent"] / 1e6) if row["bytes_sent"] else "–"
    return cells | _cost(row["cost"], stage.items)


def _predicted(stage: Stage, row: Figures) -> dict[str, str]:
    return {
        "workers": f"{row['workers']:,}",
        f"{stage.items}/s": number(row["items_per_second"]),
        "90 %": _range(number, row["items_interval"]),
        "efficiency": percent(row["efficiency"]),
        "efficiency, 90 %": _range(percent, row["efficiency_interval"]),
        "lost most to": TERMS[row["limit"]][0] if row["limit"] else "nothing",
    } | _cost(row["cost"], stage.items)


def _cost(cost: dict[str, float], items: str) -> dict[str, str]:
    cells = {f"worker-s per 1,000 {items}": number(cost["worker_seconds_per_1000"])}
    if cost["gpu_seconds_per_1000"]:
        cells[f"GPU-s per 1,000 {items}"] = number(cost["gpu_seconds_per_1000"])
    if "price_per_1000" in cost:
        cells[f"price of 1,000 {items}"] = f"{cost['price_per_1000']:.3g}"
    return cells


def drawings(stage: Stage) -> list[tuple[str, str, str]]:
    """Title, data URI and note of each plot of a stage."""
    note = "Dots are measured, lines are the model, dashed would be linear; bars are the middle 90 % of a bootstrap."
    shares = {f"Where the time goes: {line.name}": _shares(stage, line) for line in stage.lines}
    shown = [(title, uri, "By the model, at each count.") for title, uri in shares.items()]
    return [("Throughput", _throughput(stage), note), *shown]


def _throughput(stage: Stage) -> str:
    """Items a second against workers, both in powers; dashed lines are perfectly linear."""
    with svg(1, WIDTH, HEIGHT) as (drawing, (axes,)):
        for line, colour in zip(stage.lines, COLOURS, strict=True):
            _draw(axes, line, colour)
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel(f"{stage.items} a second (log scale)")
        axes.set_xlim(0.9, 1.1 * FURTHEST)
        worker_axis(axes, [1, 2, *TARGETS], "workers (log scale)")
    return drawing.uri


def _draw(axes: Axes, line: Line, colour: str) -> None:
    """The model at every eighth of an octave, what was measured, and intervals where it was extrapolated."""
    most = min(line.curve.most or FURTHEST, FURTHEST)
    counts = sorted({min(most, round(2 ** (i / 8))) for i in range(8 * 10 + 1)})
    axes.plot(counts, [count * line.curve.throughput(1) for count in counts], "--", lw=0.9, color=colour, alpha=0.55)
    axes.plot(counts, [line.curve.throughput(count) for count in counts], lw=1.6, color=colour, label=line.name)
    workers, items = ([row[name] for row in line.measured] for name in ("workers", "items_per_second"))
    axes.plot(workers, items, "o", ms=6, color=colour, zorder=4)
    for row in line.predicted:
        axes.plot([row["workers"]] * 2, row["items_interval"], "-", lw=5, color=colour, alpha=0.3, solid_capstyle="butt")


def worker_axis(axes: Axes, ticks: Sequence[int], label: str, columns: int = 1) -> None:
    """Numbers of workers in powers of two along the bottom, short numbers at the side, and a legend above."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda figure, _: short_number(figure)))
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(label)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=columns)


def _shares(stage: Stage, line: Line) -> str:
    """What the workers' time goes into, at counts that were measured and those that were not."""
    counts = sorted({row["workers"] for row in stage.measured} | set(targets(line.curve)))
    rows = [line.curve.terms(count) for count in counts]
    shares = {name: np.array([100 * row[name] / sum(row.values()) for row in rows]) for name in rows[0]}
    with svg(1, WIDTH, 1.8 + 0.3 * len(counts)) as (drawing, (axes,)):
        left = np.zeros(len(counts))
        for name, widths in shares.items():
            if widths.max() > 0.01:
                label, colour, _ = TERMS[name]
                bars = axes.barh(range(len(counts)), widths, 0.72, left, color=colour, label=label)
                numbers = [f"{width:.0f}" if width >= 5 else "" for width in widths]  # in bars that have room for one
                axes.bar_label(bars, numbers, label_type="center", fontsize=8, color="white" if colour in DARK else INK)
                left += widths
        axes.set_yticks(range(len(counts)), [f"{count:,}" for count in counts])
        axes.set_ylim(len(counts) - 0.5, -0.5)
        axes.set_ylabel("workers")
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the time, %")
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, handlelength=1, columnspacing=1)
    return drawing.uri
