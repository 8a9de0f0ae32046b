"""What was measured at each worker count, and what the fitted model makes of it: figures for people, the page and MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from tune.scaling.model import Curve, ExtractModel, Link, TrainModel, bootstrap, fit_extract, fit_train, interval
from tune.scaling.rows import ExtractRow, TrainRow

TARGETS = (8, 64, 512)
LEVELS = (0.8, 0.5)
BUSY = 0.2  # share of a machine above which other work is worth a warning
WHY = {
    "start": "the start-up of engines does not shrink with more of them",
    "rows": "the teacher itself takes the time",
    "sharing": "workers on one machine share its memory and cores",
    "last units": "units are whole, so most actors have nothing to do while the last ones are extracted",
    "manifest": "the driver alone derives the manifest from the shards",
    "fixed": "a step's optimizer update and overheads take as long however few examples a worker has",
    "examples": "examples are whole, so the slowest worker has more than its share",
    "volume": "the gradients' bytes take their time through the slowest link",
    "hops": "an all-reduce among more workers takes more hops, each with its latency",
    "waiting": "all wait for the slowest worker",
}


@dataclass(frozen=True)
class Measured:
    """A measured count of one line; costs are of 1,000 items, bytes one worker's in a step of a ring all-reduce."""

    line: str
    workers: int
    nodes: int
    items_per_second: float
    efficiency: float
    startup: float
    busy: float
    communication_share: float | None
    bytes_sent: int | None
    cost: dict[str, float]


@dataclass(frozen=True)
class Predicted:
    """What the model says of a count nobody measured; intervals are the middle 90 % of a bootstrap over the samples."""

    workers: int
    items_per_second: float
    items_interval: tuple[float, float]
    efficiency: float
    efficiency_interval: tuple[float, float]
    losses: dict[str, float]
    limit: str | None
    cost: dict[str, float]


@dataclass(frozen=True)
class Line:
    """One way to scale: its model, what that says at `TARGETS`, and where and why the efficiency falls under `LEVELS`."""

    name: str
    curve: Curve
    predicted: tuple[Predicted, ...]
    falls: tuple[tuple[float, int | None, str | None], ...]

    def sentence(self) -> str:
        """Where it stops being linear, and why."""
        name = self.name[0].upper() + self.name[1:]
        found = [(level, workers, limit) for level, workers, limit in self.falls if workers]
        most = f" to its limit of {self.curve.most:,} workers" if self.curve.most else " as far as was looked, 4,096 workers"
        if not found:
            return f"{name}: above {100 * LEVELS[0]:.0f} % efficiency{most}."
        parts = [f"under {100 * level:.0f} % with {workers:,} workers" for level, workers, _ in found]
        reasons = list(dict.fromkeys(WHY[limit] for _, _, limit in found if limit))
        return f"{name}: first {', first '.join(parts)}: {'; then '.join(reasons)}."


@dataclass(frozen=True)
class Parameter:
    """A number of the model: `measured` with its interval, `assumed`, or `not seen` where nothing told it from zero."""

    name: str
    value: float
    unit: str
    source: str
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Stage:
    """`extract` or `train`: what was measured at each count, the ways to scale, and the model's parameters."""

    name: str
    items: str
    measured: tuple[Measured, ...]
    lines: tuple[Line, ...]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Result:
    """All stages, and the settings they were measured under."""

    stages: tuple[Stage, ...]
    settings: dict[str, Any]

    def figures(self) -> dict[str, Any]:
        """For scale.json."""
        return {stage.name: _figures(stage) for stage in self.stages}

    def disturbed(self) -> str | None:
        """A warning where the machine had other work to do."""
        most = max(row.busy for stage in self.stages for row in stage.measured)
        if most < BUSY:
            return None
        return (
            f"Other work took up to {100 * most:.0f} % of the machine before a measurement: the figures, and all that is "
            "extrapolated from them, tell of that too. Measure on an idle machine before believing them."
        )

    def metrics(self) -> list[tuple[int, dict[str, float]]]:
        """For MLflow, a step being a number of workers."""
        return [(row.workers, _metrics(stage, row)) for stage in self.stages for row in stage.measured]


def _figures(stage: Stage) -> dict[str, Any]:
    lines = {
        line.name: {
            "predicted": [asdict(row) for row in line.predicted],
            "falls_under": [{"efficiency": level, "workers": n, "limit": limit} for level, n, limit in line.falls],
            "sentence": line.sentence(),
        }
        for line in stage.lines
    }
    measured = [asdict(row) for row in stage.measured]
    return {"measured": measured, "lines": lines, "parameters": [asdict(each) for each in stage.parameters]}


def _metrics(stage: Stage, row: Measured) -> dict[str, float]:
    prefix = f"{stage.name}/" + ("strong_" if row.line == STRONG else "")
    named = {f"{stage.items}_per_second": row.items_per_second, "efficiency": row.efficiency, "startup_seconds": row.startup}
    named |= {name: value for name in ("communication_share", "bytes_sent") if (value := getattr(row, name)) is not None}
    return {prefix + name: float(value) for name, value in (named | row.cost).items()}


STEADY, JOB = "extraction, all actors at work", "extraction of {:,} comments, start included"
WEAK, STRONG = "training, {} examples a worker", "training, batch shared out"


def extract_stage(rows: Sequence[ExtractRow], job: int, gpus: float, price: float | None) -> Stage:
    """Extraction: measured and extrapolated to a job of so many comments."""
    cost = _costs(gpus, price)
    model, draws = fit_extract(rows), bootstrap(rows, fit_extract)
    lines = (
        _line(STEADY, model, draws, ExtractModel.steady, cost),
        _line(JOB.format(job), model, draws, lambda each: each.job(job), cost),
    )
    measured = _measured(STEADY, rows, cost)
    shared = "measured" if model.per_node > 1 else "not seen"
    parameters = _parameters(
        model,
        draws,
        ("start-up", 1, "s", "measured", "start"),
        ("a comment", 1e3, "ms", "measured", "row"),
        ("a comment, for each other actor on the machine", 1e3, "ms", shared, "sharing"),
        ("a unit's line in the manifest", 1e3, "ms", "measured", "manifest"),
    )
    return Stage("extract", "rows", measured, lines, parameters)


def train_stage(rows: Sequence[TrainRow], batch: int, link: Link, gpus: float, price: float | None) -> Stage:
    """Training: measured and extrapolated, with the batch for each worker (weak scaling) and shared out (strong scaling).

    Args:
        gpus: of one worker; with them all-reduce is NCCL's.
    """
    cost, weak = _costs(gpus, price), WEAK.format(batch)

    def fit(some: Sequence[TrainRow]) -> TrainModel:
        return fit_train(some, link, tree=gpus > 0)

    model, draws = fit(rows), bootstrap(rows, fit)
    lines = (
        _line(weak, model, draws, lambda each: each.weak(batch), cost),
        _line(STRONG, model, draws, lambda each: each.strong(batch), cost),
    )
    measured = _measured(weak, [row for row in rows if row.share == batch], cost)
    measured += _measured(STRONG, [row for row in rows if row.share == batch // row.workers], cost)
    return Stage("train", "examples", measured, lines, _train_parameters(rows, model, draws))


def _train_parameters(rows: Sequence[TrainRow], model: TrainModel, draws: list[TrainModel]) -> tuple[Parameter, ...]:
    shared = "measured" if model.per_node > 1 else "not seen"
    several = "measured" if any(row.workers > 1 for row in rows) else "not seen"
    local = "measured" if any(row.workers > 1 and row.nodes == 1 for row in rows) else "assumed"
    between = "measured" if any(row.nodes > 1 for row in rows) else "assumed"
    return _parameters(
        model,
        draws,
        ("a step, whatever its examples", 1e3, "ms", "measured", "fixed"),
        ("an example", 1e3, "ms", "measured", "example"),
        ("an example, for each other worker on the machine", 1e3, "ms", shared, "sharing"),
        ("exchange hidden by the backward pass", 100, "%", several, "overlap"),
        ("waiting, in standard deviations of a step", 100, "%", several, "waiting"),
        ("gradients of a step", 1e-6, "MB", "measured", "bytes"),
        ("bandwidth within a machine", 1e-9, "GB/s", local, "local.bandwidth"),
        ("latency of a hop within a machine", 1e6, "µs", local, "local.latency"),
        ("bandwidth between machines", 1e-9, "GB/s", between, "link.bandwidth"),
        ("latency of a hop between machines", 1e6, "µs", between, "link.latency"),
    )


def _parameters(model: Any, draws: Sequence[Any], *rows: tuple[str, float, str, str, str]) -> tuple[Parameter, ...]:
    """Names, factors to their units, units, sources, and where the model has them."""
    found = []
    for name, factor, unit, source, key in rows:
        value = attrgetter(key)
        low, high = interval(factor * value(each) for each in draws)
        known = (low, high) if source == "measured" and high > low else None
        found.append(Parameter(name, factor * value(model), unit, source, known))
    return tuple(found)


def _measured(name: str, found: Sequence[ExtractRow | TrainRow], cost: Any) -> tuple[Measured, ...]:
    """The rows of one line, by workers."""
    rows = sorted(found, key=lambda row: row.workers)
    return tuple(
        Measured(
            line=name,
            workers=row.workers,
            nodes=row.nodes,
            items_per_second=row.items_per_second,
            efficiency=row.items_per_second / (row.workers * rows[0].items_per_second),
            startup=row.startup,
            busy=row.busy,
            communication_share=getattr(row, "communication_share", None),
            bytes_sent=getattr(row, "bytes_sent", None),
            cost=cost(row.workers, row.items_per_second),
        )
        for row in rows
    )


def _costs(gpus: float, price: float | None) -> Callable[[int, float], dict[str, float]]:
    """What 1,000 items take and cost, by workers and throughput."""

    def cost(workers: int, items_per_second: float) -> dict[str, float]:
        seconds = 1000 * workers / items_per_second
        found = {"worker_seconds_per_1000": seconds, "gpu_seconds_per_1000": gpus * seconds}
        return found | ({} if price is None else {"price_per_1000": price * seconds / 3600})

    return cost


def _line(name: str, model: Any, draws: Sequence[Any], make: Callable[[Any], Curve], cost: Any) -> Line:
    curve, others = make(model), [make(each) for each in draws]
    predicted = tuple(_predicted(curve, others, workers, cost) for workers in targets(curve))
    falls = tuple((level, n := curve.falls_under(level), curve.limit(n) if n else None) for level in LEVELS)
    return Line(name, curve, predicted, falls)


def targets(curve: Curve) -> list[int]:
    """The counts to extrapolate to: `TARGETS`, where a curve ends before them up to its end."""
    most = curve.most or max(TARGETS)
    return sorted({min(target, most) for target in TARGETS})


def _predicted(curve: Curve, others: Sequence[Curve], workers: int, cost: Any) -> Predicted:
    throughput = curve.throughput(workers)
    return Predicted(
        workers=workers,
        items_per_second=throughput,
        items_interval=interval(each.throughput(workers) for each in others),
        efficiency=curve.efficiency(workers),
        efficiency_interval=interval(each.efficiency(workers) for each in others),
        losses=curve.losses(workers),
        limit=curve.limit(workers),
        cost=cost(workers, throughput),
    )
