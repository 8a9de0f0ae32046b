"""Scaling for people: tables and sentences for the terminal, and one self-contained HTML page."""

from __future__ import annotations

from rich.table import Table

from pipeline.base import page
from pipeline.base.page import percent
from tune.scaling.plots import TERMS, drawings
from tune.scaling.results import Line, Measured, Parameter, Predicted, Result, Stage


def render(result: Result) -> str:
    """The page."""
    return page.render(
        __file__,
        "page.html.jinja",
        result=result,
        drawings=drawings,
        measured=measured,
        predicted=predicted,
        value=value,
    )


def number(figure: float) -> str:
    """Three digits, or all before the point."""
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"


def value(parameter: Parameter) -> str:
    """A parameter with its interval."""
    spread = f" ({number(parameter.interval[0])} to {number(parameter.interval[1])})" if parameter.interval else ""
    return f"{number(parameter.value)}{spread} {parameter.unit}"


def measured(stage: Stage, line: Line) -> list[dict[str, str]]:
    """The measured rows of a line, cells by heading."""
    return [_measured(stage, row) for row in stage.measured if row.line == line.name]


def predicted(stage: Stage, line: Line) -> list[dict[str, str]]:
    """Its extrapolated rows, cells by heading."""
    return [_predicted(stage, row) for row in line.predicted]


def _measured(stage: Stage, row: Measured) -> dict[str, str]:
    found = {
        "workers": f"{row.workers:,}",
        "machines": f"{row.nodes:,}",
        f"{stage.items}/s": number(row.items_per_second),
        "a worker": number(row.items_per_second / row.workers),
        "efficiency": percent(row.efficiency),
        "start-up, s": number(row.startup),
    }
    if stage.name == "train":
        sent = "–" if not row.bytes_sent else number(row.bytes_sent / 1e6)
        found |= {"exchange": percent(row.communication_share), "MB sent a step": sent}
    return found | _cost(row.cost, stage.items)


def _predicted(stage: Stage, row: Predicted) -> dict[str, str]:
    low, high = row.items_interval
    return {
        "workers": f"{row.workers:,}",
        f"{stage.items}/s": number(row.items_per_second),
        "90 %": f"{number(low)} to {number(high)}",
        "efficiency": percent(row.efficiency),
        "efficiency, 90 %": f"{percent(row.efficiency_interval[0])} to {percent(row.efficiency_interval[1])}",
        "lost most to": TERMS[row.limit][0] if row.limit else "nothing",
    } | _cost(row.cost, stage.items)


def _cost(cost: dict[str, float], items: str) -> dict[str, str]:
    found = {f"worker-s per 1,000 {items}": number(cost["worker_seconds_per_1000"])}
    if cost["gpu_seconds_per_1000"]:
        found[f"GPU-s per 1,000 {items}"] = number(cost["gpu_seconds_per_1000"])
    if "price_per_1000" in cost:
        found[f"price of 1,000 {items}"] = f"{cost['price_per_1000']:.3g}"
    return found


def tables(result: Result) -> list[Table]:
    """Measured and extrapolated rows for the terminal."""
    both = (("measured", measured), ("extrapolated", predicted))
    return [
        page.table(f"{line.name}: {what}", rows)
        for stage in result.stages
        for line in stage.lines
        for what, rows_of in both
        if (rows := rows_of(stage, line))
    ]


def notes(result: Result) -> list[str]:
    """Where each line stops being linear, and what of it is assumed."""
    lines = [line.sentence() for stage in result.stages for line in stage.lines]
    for stage in result.stages:
        assumed = [f"{each.name} {value(each)}" for each in stage.parameters if each.source == "assumed"]
        lines += [f"assumed, not measured: {'; '.join(assumed)}"] if assumed else []
    return lines + ([f"warning: {warning}"] if (warning := result.disturbed()) else [])
