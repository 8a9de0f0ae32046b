"""A plan for people: tables for the terminal, one self-contained HTML page, and plan.json."""

from __future__ import annotations

from rich.table import Table

from cluster.plan.estimate import Estimate, Point, Stage
from cluster.plan.plots import cost_plot, wall_plot
from pipeline.base import page, storage
from tune.compare.plots import short_number
from tune.scaling.page import number

FILE, PAGE = "plan.json", "plan.html"
WORKERS = "workers (extract, train)"
UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def write(plan: Estimate, folder: str) -> None:
    """Leaves `plan.json` and `plan.html` in a folder."""
    storage.write_json(storage.join(folder, FILE), plan.figures())
    storage.write_text(storage.join(folder, PAGE), render(plan))


def render(plan: Estimate) -> str:
    """The page."""
    return page.render(
        __file__,
        "page.html.jinja",
        plan=plan,
        sections=sections(plan),
        notes=notes(plan),
        drawings=[("Wall time", wall_plot(plan)), ("Cost", cost_plot(plan))],
    )


def tables(plan: Estimate) -> list[Table]:
    """For the terminal."""
    return [page.table(title, rows) for title, rows in sections(plan)]


def sections(plan: Estimate) -> list[tuple[str, list[dict[str, str]]]]:
    """Titles and rows, cells by heading."""
    elsewhere = [{"machine": name} | _elsewhere(point) for name, point in plan.elsewhere.items()]
    return [
        ("The run as configured", [_stage(stage) for stage in [*plan.stages, plan.total]]),
        ("With other numbers of workers", [_point(point) for point in plan.points]),
        *([("The same job by Retort on one machine of each kind, from published peaks", elsewhere)] if elsewhere else []),
        ("Storage", [{"what": name, "size": size(count)} for name, count in plan.bytes.items()]),
    ]


def notes(plan: Estimate) -> list[str]:
    """What the figures stand on, and what they leave out."""
    work, tokens = plan.work, plan.tokens
    lengths = work.lengths
    return [
        *(f"warning: {note}" for note in plan.warnings),
        *plan.assumptions,
        f"{work.answers:,} answers of {lengths.answer} tokens to prompts of {lengths.prompt}, {work.calls:g} model calls each; "
        f"{work.kept_steps} steps with {lengths.watched} logits are kept.",
        f"A student of {short_number(work.params)} parameters, {short_number(work.body)} without embedding and output head, on "
        f"{work.examples:,} examples of up to {work.sequence} tokens, {work.steps:,} steps of {work.batch}.",
        f"More workers pay, most of their time being of use, up to {plan.pays['extract']:,} in extraction and "
        f"{plan.pays['train']:,} in training: a larger train.batch_size gives more of them something to do.",
        f"Training reads {short_number(tokens['trained'])} tokens, {short_number(tokens['distinct'])} of them distinct; "
        f"{short_number(tokens['chinchilla'])} would be compute-optimal from nothing (Chinchilla: 20 a parameter), without a "
        "teacher's logits.",
        "A machine is paid for as a whole, at the prices in prices.yaml: check them. Left out: booting machines, reading and "
        "filtering comments, failures and spot machines lost, storage and traffic.",
    ]


def _stage(stage: Stage) -> dict[str, str]:
    machines = f"{stage.machines} × {stage.machine}" if stage.machine else ""
    return {
        "stage": stage.name,
        "machines": machines,
        "workers": f"{stage.workers:,}",
        "wall time": duration(stage.wall_hours),
        "worker-hours": number(stage.worker_hours),
        "on demand": dollars(stage.dollars),
        "spot": dollars(stage.spot_dollars),
        "rate from": stage.source,
        "items/s a worker": number(stage.rate) if stage.rate else "",
    }


def _point(point: Point) -> dict[str, str]:
    efficiency = {f"{name}, efficiency": f"{100 * point.efficiency[name]:.0f} %" for name in ("extract", "train")}
    return {"workers": f"{max(point.workers.values()):,}"} | _hours(point) | efficiency | _money(point)


def _elsewhere(point: Point | None) -> dict[str, str]:
    if point is None:
        empty = dict.fromkeys(("extract", "train", "evaluate", "in all", "worker-hours", "on demand", "spot"), "–")
        return {WORKERS: "teacher does not fit"} | empty
    workers = ", ".join(f"{point.workers[name]:,}" for name in ("extract", "train"))
    return {WORKERS: workers} | _hours(point) | _money(point)


def _hours(point: Point) -> dict[str, str]:
    stages = {name: duration(each) for name, each in point.stage_hours.items()}
    return stages | {"in all": duration(point.wall_hours)}


def _money(point: Point) -> dict[str, str]:
    return {
        "worker-hours": number(point.worker_hours),
        "on demand": dollars(point.dollars),
        "spot": dollars(point.spot_dollars),
    }


def dollars(amount: float | None) -> str:
    """Whole dollars from 100, cents below; a dash where there is no price."""
    if amount is None:
        return "–"
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.2f}"


def duration(hours: float) -> str:
    """Seconds, minutes, hours or days."""
    if hours < 2 / 60:
        return f"{3600 * hours:.3g} s"
    if hours < 2:
        return f"{60 * hours:.3g} min"
    return f"{number(hours)} h" if hours < 72 else f"{number(hours / 24)} days"


def size(count: float) -> str:
    """Bytes, in powers of ten."""
    unit, each = next(((name, each) for name, each in UNITS if count >= each), ("B", 1.0))
    return f"{number(count / each)} {unit}"
