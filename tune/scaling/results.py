"""What was measured at each worker count, and what the fitted model makes of it: the figures of scale.json and of MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

from pipeline.base.plots import STUDENT
from tune.scaling.model import Curve, ExtractModel, Link, TrainModel, bootstrap, fit_extract, fit_train, interval
from tune.scaling.rows import ExtractRow, TrainRow

Figures = dict[str, Any]  # a row by its names in scale.json
Cost = Callable[[int, float], dict[str, float]]  # of 1,000 items, by workers and items a second

TARGETS = (8, 64, 512)
LEVELS = (0.8, 0.5)
BUSY = 0.2  # share of a machine above which other work is worth a warning
STEADY, JOB = "extraction, all actors at work", "extraction of {:,} comments, start included"
WEAK, STRONG = "training, {} examples a worker", "training, batch shared out"
TERMS = {  # of the model: its name, its colour, and why it keeps more workers from being as much faster
    "rows": ("the teacher", STUDENT, "the teacher itself takes the time"),
    "examples": ("examples", STUDENT, "examples are whole, so the slowest worker has more than its share"),
    "fixed": (
        "fixed part of a step",
        "#9db8d6",
        "a step's optimizer update and overheads take as long however few examples a worker has",
    ),
    "sharing": ("sharing a machine", "#c9a45c", "workers on one machine share its memory and cores"),
    "waiting": ("waiting for the slowest", "#8b4a9c", "all wait for the slowest worker"),
    "volume": ("exchange: bytes", "#a8451f", "the gradients' bytes take their time through the slowest link"),
    "hops": ("exchange: hops", "#e0917a", "an all-reduce among more workers takes more hops, each with its latency"),
    "start": ("start-up", "#2a7d3f", "the start-up of engines does not shrink with more of them"),
    "last units": (
        "idle at the last units",
        "#8bbf9a",
        "units are whole, so most actors have nothing to do while the last ones are extracted",
    ),
    "manifest": ("manifest", "#6b6b6b", "the driver alone derives the manifest from the shards"),
}
# Of the model: what it is called, the factor to its unit, the unit, and where the model has it.
EXTRACT_PARAMETERS = (
    ("start-up", 1, "s", "start"),
    ("a comment", 1e3, "ms", "row"),
    ("a comment, for each other actor on the machine", 1e3, "ms", "sharing"),
    ("a unit's line in the manifest", 1e3, "ms", "manifest"),
)
TRAIN_PARAMETERS = (
    ("a step, whatever its examples", 1e3, "ms", "fixed"),
    ("an example", 1e3, "ms", "example"),
    ("an example, for each other worker on the machine", 1e3, "ms", "sharing"),
    ("exchange hidden by the backward pass", 100, "%", "overlap"),
    ("waiting, in standard deviations of a step", 100, "%", "waiting"),
    ("gradients of a step", 1e-6, "MB", "bytes"),
    ("bandwidth within a machine", 1e-9, "GB/s", "local.bandwidth"),
    ("latency of a hop within a machine", 1e6, "µs", "local.latency"),
    ("bandwidth between machines", 1e-9, "GB/s", "link.bandwidth"),
    ("latency of a hop between machines", 1e6, "µs", "link.latency"),
)


@dataclass(frozen=True)
class Line:
    """One way to scale, by number of workers."""

    name: str
    curve: Curve
    measured: list[Figures]  # bytes sent are one worker's in a step of a ring all-reduce
    predicted: list[Figures]  # at `TARGETS`; intervals are the middle 90 % of a bootstrap over the samples
    falls: list[Figures]  # where the efficiency first falls under each of `LEVELS`, and the term that loses most there

    def sentence(self) -> str:
        """Where it stops being linear, and why."""
        name, found = self.name[0].upper() + self.name[1:], [fall for fall in self.falls if fall["workers"]]
        if not found:
            most = f"to its limit of {self.curve.most:,} workers" if self.curve.most else "as far as was looked, 4,096 workers"
            return f"{name}: above {100 * LEVELS[0]:.0f} % efficiency {most}."
        parts = [f"first under {100 * fall['efficiency']:.0f} % with {fall['workers']:,} workers" for fall in found]
        reasons = dict.fromkeys(TERMS[fall["limit"]][2] for fall in found if fall["limit"])
        return f"{name}: {', '.join(parts)}: {'; then '.join(reasons)}."


@dataclass(frozen=True)
class Stage:
    """`extract` or `train`: the ways to scale and the model's parameters, with sources `measured`, `assumed` or `not seen`."""

    name: str
    items: str
    lines: list[Line]
    parameters: list[Figures]

    @property
    def measured(self) -> list[Figures]:
        """The measured rows of all lines."""
        return [row for line in self.lines for row in line.measured]

    def figures(self) -> Figures:
        """For scale.json."""
        lines = {
            line.name: {"predicted": line.predicted, "falls_under": line.falls, "sentence": line.sentence()}
            for line in self.lines
        }
        return {"measured": self.measured, "lines": lines, "parameters": self.parameters}

    def metrics(self, row: Figures) -> dict[str, float]:
        """A measured row for MLflow."""
        prefix = f"{self.name}/" + ("strong_" if row["line"] == STRONG else "")
        named = {f"{self.items}_per_second": row["items_per_second"], "startup_seconds": row["startup"]} | row["cost"]
        named |= {name: row[name] for name in ("efficiency", "communication_share", "bytes_sent") if row[name] is not None}
        return {prefix + name: float(value) for name, value in named.items()}


@dataclass(frozen=True)
class Result:
    """All stages, and the settings they were measured under."""

    stages: tuple[Stage, ...]
    settings: dict[str, Any]

    def figures(self) -> Figures:
        """For scale.json."""
        return {stage.name: stage.figures() for stage in self.stages}

    def disturbed(self) -> str | None:
        """A warning where the machine had other work to do."""
        most = max(row["busy"] for stage in self.stages for row in stage.measured)
        if most < BUSY:
            return None
        return (
            f"Other work took up to {100 * most:.0f} % of the machine before a measurement: the figures, and all that is "
            "extrapolated from them, tell of that too. Measure on an idle machine before believing them."
        )

    def metrics(self) -> list[tuple[int, dict[str, float]]]:
        """For MLflow, a step being a number of workers."""
        return [(row["workers"], stage.metrics(row)) for stage in self.stages for row in stage.measured]


def extract_stage(rows: Sequence[ExtractRow], job: int, gpus: float, price: float | None) -> Stage:
    """Extraction: measured and extrapolated to a job of so many comments."""
    models, cost = [fit_extract(rows), *bootstrap(rows, fit_extract)], partial(_cost, gpus, price)
    lines = [
        _line(STEADY, ExtractModel.steady, models, rows, cost),
        _line(JOB.format(job), lambda model: model.job(job), models, [], cost),
    ]
    return Stage("extract", "rows", lines, _parameters(EXTRACT_PARAMETERS, models, rows))


def train_stage(rows: Sequence[TrainRow], batch: int, link: Link, gpus: float, price: float | None) -> Stage:
    """Training: measured and extrapolated, with the batch for each worker (weak scaling) and shared out (strong scaling).

    Args:
        gpus: of one worker; with them all-reduce is NCCL's.
    """

    def fit(some: Sequence[TrainRow]) -> TrainModel:
        return fit_train(some, link, tree=gpus > 0)

    models, cost = [fit(rows), *bootstrap(rows, fit)], partial(_cost, gpus, price)
    weak = [row for row in rows if row.share == batch]
    strong = [row for row in rows if row.share == batch // row.workers]
    lines = [
        _line(WEAK.format(batch), lambda model: model.weak(batch), models, weak, cost),
        _line(STRONG, lambda model: model.strong(batch), models, strong, cost),
    ]
    return Stage("train", "examples", lines, _parameters(TRAIN_PARAMETERS, models, rows))


def _cost(gpus: float, price: float | None, workers: int, items_per_second: float) -> dict[str, float]:
    """What 1,000 items take and cost."""
    seconds = 1000 * workers / items_per_second
    found = {"worker_seconds_per_1000": seconds, "gpu_seconds_per_1000": gpus * seconds}
    return found | ({} if price is None else {"price_per_1000": price * seconds / 3600})


def _line(
    name: str, make: Callable[[Any], Curve], models: Sequence[Any], rows: Sequence[ExtractRow | TrainRow], cost: Cost
) -> Line:
    """The first model is the fitted one, the others are those of the bootstrap."""
    curve, *others = map(make, models)
    rows = sorted(rows, key=lambda row: row.workers)
    measured = [_measured(name, row, rows[0].items_per_second, cost) for row in rows]
    predicted = [_predicted(curve, others, workers, cost) for workers in targets(curve)]
    firsts = [(level, curve.falls_under(level)) for level in LEVELS]
    falls = [{"efficiency": level, "workers": n, "limit": curve.limit(n) if n else None} for level, n in firsts]
    return Line(name, curve, measured, predicted, falls)


def targets(curve: Curve) -> list[int]:
    """The counts to extrapolate to: `TARGETS`, where a curve ends before them up to its end."""
    most = curve.most or max(TARGETS)
    return sorted({min(target, most) for target in TARGETS})


def _measured(name: str, row: ExtractRow | TrainRow, alone: float, cost: Cost) -> Figures:
    """A measured row of a line; `alone` is the throughput of the fewest workers."""
    return {
        "line": name,
        "workers": row.workers,
        "nodes": row.nodes,
        "items_per_second": row.items_per_second,
        "efficiency": row.items_per_second / (row.workers * alone),
        "startup": row.startup,
        "busy": row.busy,
        "communication_share": getattr(row, "communication_share", None),
        "bytes_sent": getattr(row, "bytes_sent", None),
        "cost": cost(row.workers, row.items_per_second),
    }


def _predicted(curve: Curve, others: Sequence[Curve], workers: int, cost: Cost) -> Figures:
    throughput = curve.throughput(workers)
    return {
        "workers": workers,
        "items_per_second": throughput,
        "items_interval": interval(each.throughput(workers) for each in others),
        "efficiency": curve.efficiency(workers),
        "efficiency_interval": interval(each.efficiency(workers) for each in others),
        "losses": curve.losses(workers),
        "limit": curve.limit(workers),
        "cost": cost(workers, throughput),
    }


def _parameters(
    names: Sequence[tuple[str, float, str, str]], models: Sequence[Any], rows: Sequence[ExtractRow | TrainRow]
) -> list[Figures]:
    """The fitted model's parameters, and their intervals where they were measured and samples differ."""
    found, sources = [], _sources(rows)
    for name, factor, unit, key in names:
        value, *others = (factor * attrgetter(key)(model) for model in models)
        source, (low, high) = sources.get(key, "measured"), interval(others)
        known = (low, high) if source == "measured" and high > low else None
        found.append({"name": name, "value": value, "unit": unit, "source": source, "interval": known})
    return found


def _sources(rows: Sequence[ExtractRow | TrainRow]) -> dict[str, str]:
    """Of the parameters that these rows do not tell: `assumed`, or `not seen` where nothing tells it from zero."""
    several, found = [row for row in rows if row.workers > 1], {}
    if all(row.per_node == 1 for row in rows):
        found["sharing"] = "not seen"
    if not several:
        found |= dict.fromkeys(("overlap", "waiting"), "not seen")
    if all(row.nodes > 1 for row in several):
        found |= dict.fromkeys(("local.bandwidth", "local.latency"), "assumed")
    if all(row.nodes == 1 for row in several):
        found |= dict.fromkeys(("link.bandwidth", "link.latency"), "assumed")
    return found
