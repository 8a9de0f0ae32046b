"""Runs that differ in nothing but the seed are one student, trained several times: a group, with its spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from statistics import fmean, stdev

from pipeline.base.errors import UserError, printable
from pipeline.base.tracking import FIELD, field_of
from tune.compare.pareto import front
from tune.compare.runs import StudentRun

SEED, DIGEST, OBJECTIVE = "train.seed", "shards.digest", "train.objective"
WHOLE, COMMENTS, PARAMETERS = "test/whole", "test/comments", "parameters"
FIRST = (OBJECTIVE, "student.layers", "student.width")  # what a label begins with
OF_WIDTH = ("student.heads", "student.mlp")  # usually chosen with the width, and then said by it
OF_SHARDS = {f"student.{key}" for key in ("input_vocabulary", "embeddings", "output_vocabulary", "context")}  # not chosen
LONGEST_VALUE = 24  # characters of a value in a label


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, and its sample standard deviation where there are several."""

    mean: float
    std: float | None
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """The spread of some values; None of none."""
        if not values:
            return None
        return Spread(fmean(values), stdev(values) if len(values) > 1 else None, tuple(values))


@dataclass(frozen=True)
class Group:
    """A student, by its finished runs.

    Attributes:
        number: its rank by whole answers, from 1.
        label: what tells it from the others.
        runs: its finished runs, one a seed.
        front: whether it is on the Pareto front of whole answers against parameters.
    """

    number: int
    label: str
    runs: tuple[StudentRun, ...]
    front: bool = False

    def spread(self, metric: str) -> Spread | None:
        """A metric over the runs that have it."""
        return Spread.of([run.metrics[metric] for run in self.runs if metric in run.metrics])

    def mean(self, metric: str) -> float | None:
        """A metric's mean over the runs that have it."""
        found = self.spread(metric)
        return found.mean if found else None


@dataclass(frozen=True)
class Unfinished:
    """A run that did not come to its end: stopped early, interrupted, failed, refused, or still running."""

    label: str
    run: StudentRun


def group_runs(runs: Sequence[StudentRun], by: Sequence[str] = ()) -> tuple[list[Group], list[Unfinished]]:
    """Finished runs as groups, the best first, and the others.

    Args:
        by: params to label them by, in full or by their last part; none takes those in which the groups differ.

    Raises:
        UserError: no run has such a param, or several params end so.
    """
    alike: dict[frozenset[tuple[str, str]], list[StudentRun]] = {}
    for run in runs:
        alike.setdefault(frozenset((key, value) for key, value in run.params.items() if key != SEED), []).append(run)
    labels = _labels(list(alike.values()), by)
    groups, unfinished = [], []
    for label, members in zip(labels, alike.values(), strict=True):
        finished = tuple(run for run in members if run.state == "finished")
        if finished:
            groups.append(Group(0, label, finished))
        unfinished += [Unfinished(label, run) for run in members if run.state != "finished"]
    return _ranked(groups), unfinished


def fields_of(groups: Sequence[Group]) -> dict[str, str]:
    """The output fields that any of the runs was measured on: the metric of each, and its name."""
    metrics = {name for group in groups for run in group.runs for name in run.metrics if name.startswith(FIELD)}
    return {metric: printable(field_of(metric)) for metric in sorted(metrics)}


def varying(params: Sequence[dict[str, str]]) -> list[str]:
    """The params with more than one value, the telling ones first; what follows from another is left out.

    Heads and MLP follow from the width where each width has one of them; of the shards, the digest says it all.
    """
    keys = sorted({key for each in params for key in each} - {SEED})
    differ = [key for key in keys if len({each.get(key) for each in params}) > 1]
    told = [key for key in differ if key == DIGEST or not (key.startswith("shards.") or key in OF_SHARDS)]
    told = [key for key in told if not (key in OF_WIDTH and "student.width" in told and _follows(key, "student.width", params))]
    return sorted(told, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), key == DIGEST, key))


def _follows(key: str, other: str, params: Sequence[dict[str, str]]) -> bool:
    pairs = {(each.get(other), each.get(key)) for each in params}
    return len(pairs) == len({value for value, _ in pairs})


def short_names(keys: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole where another known key ends so."""
    ends = Counter(_end(key) for key in {*known, *keys})
    return {key: _end(key) if ends[_end(key)] == 1 else key for key in keys}


def _end(key: str) -> str:
    return key.rpartition(".")[2]


def _labels(groups: list[list[StudentRun]], by: Sequence[str]) -> list[str]:
    params = [members[0].params for members in groups]
    known = sorted({key for each in params for key in each})
    keys = [_resolve(key, known) for key in by] or varying(params)
    names = short_names(keys, known)
    return [_label(members[0], names, missing=bool(by)) or printable(members[0].name) for members in groups]


def _label(run: StudentRun, names: dict[str, str], missing: bool) -> str:
    """Such as `objective=temperature, layers=4`. A param the run does not have is left out, unless it was asked for."""
    shown = {name: run.params.get(key, "–" if missing else None) for key, name in names.items()}
    return ", ".join(f"{name}={short_value(value)}" for name, value in shown.items() if value is not None)


def short_value(value: str) -> str:
    """A param's value as a label shows it: a null is the default, a number has three digits."""
    if value == "None":
        return "default"
    try:
        number = float(value)
    except ValueError:
        text = printable(value)
        return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
    return str(int(number)) if number.is_integer() else f"{number:.3g}"


def _resolve(key: str, known: Sequence[str]) -> str:
    """The param a user means."""
    if key in known:
        return key
    found = [each for each in known if _end(each) == key]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--by {key} may be {' or '.join(found)}: name it in full")
    near = get_close_matches(key, [*known, *map(_end, known)], n=5, cutoff=0.5)
    those = f"near: {', '.join(near)}" if near else f"there are {', '.join(known)}"
    raise UserError(f"no run has a param {key!r} for --by; {those}")


def _ranked(groups: list[Group]) -> list[Group]:
    """Numbered by whole answers, best first and those not measured last, with the front marked."""
    nan = float("nan")
    best = sorted(groups, key=lambda group: (-_or(group.mean(WHOLE), -1.0), _or(group.mean(PARAMETERS), 0.0), group.label))
    points = [(_or(group.mean(WHOLE), nan), _or(group.mean(PARAMETERS), nan)) for group in best]
    marks = front(points, ("max", "min"))
    return [replace(group, number=i, front=bool(mark)) for i, (group, mark) in enumerate(zip(best, marks, strict=True), 1)]


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
