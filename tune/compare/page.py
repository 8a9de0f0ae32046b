"""`retort compare`: students side by side, as a table, `compare.json` and one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.base import page, storage
from tune.compare import plots
from tune.compare.grouping import DIGEST, Group, Unfinished, group_runs
from tune.compare.runs import Found, StudentRun, read_runs
from tune.compare.table import columns
from tune.compare.verdict import verdict

PAGE, FIGURES = "compare.html", "compare.json"
MAJORITY = "floor/majority"
FRONT = "◆"
FIRST = 12  # students shown at once, beside those on the front


@dataclass(frozen=True)
class Comparison:
    """Students side by side.

    Attributes:
        found: the runs, and where they are from.
        groups: finished students, the best first.
        unfinished: runs that were stopped early or interrupted, failed, were refused, or still go on.
        warnings: why figures may not be comparable.
        verdict: the comparison in one sentence.
    """

    found: Found
    groups: list[Group]
    unfinished: list[Unfinished]
    warnings: list[str]
    verdict: str

    @property
    def first(self) -> list[Group]:
        """The students to show at once: the best, and those on the front."""
        return [group for group in self.groups if group.front or group.number <= FIRST]

    @property
    def others(self) -> list[Group]:
        """The other finished students."""
        return [group for group in self.groups if not group.front and group.number > FIRST]


def compare_runs(uri: str, experiment: str, folder: str, search: str | None = None, by: Sequence[str] = ()) -> Comparison:
    """Reads students' runs and writes `compare.html` and `compare.json`.

    Args:
        folder: where the two files go; a path or the URI of a bucket.
        search: id or name of a search's run, to compare its trials; None takes all students of the experiment.
        by: params to label students by; none takes those in which they differ.

    Raises:
        UserError: the store cannot be reached, has no such runs, or no run has such a param.
    """
    comparison = compare(read_runs(uri, experiment, search), by)
    html = render(comparison)
    storage.write_json(storage.join(folder, FIGURES), figures(comparison))
    storage.write_text(storage.join(folder, PAGE), html)
    return comparison


def compare(found: Found, by: Sequence[str] = ()) -> Comparison:
    """Groups runs over their seeds and judges them.

    Raises:
        UserError: no run has a param named in `by`.
    """
    groups, unfinished = group_runs(found.runs, by)
    warnings = _warnings(groups)
    sentence = "No verdict: these students were not measured on the same comments." if warnings else verdict(groups)
    return Comparison(found, groups, unfinished, warnings, sentence)


def _warnings(groups: Sequence[Group]) -> list[str]:
    """Differing shards are differing test comments; so are, on the same shards, differing floors."""
    runs = [run for group in groups for run in group.runs]
    digests = Counter(run.params[DIGEST] for run in runs if DIGEST in run.params)
    if len(digests) > 1:
        counts = ", ".join(f"{digest[:12]} ({_counted(runs, 'run')})" for digest, runs in digests.most_common())
        return [
            f"These students are of {len(digests)} sets of shards: {counts}. Each was tested on its own comments and "
            "their answers, so their figures cannot be compared with each other."
        ]
    floors = {round(run.metrics[MAJORITY], 9) for run in runs if MAJORITY in run.metrics}
    if len(floors) > 1:
        shares = ", ".join(f"{100 * floor:.1f} %" for floor in sorted(floors))
        return [
            f"The floor of the majority answer differs between students ({shares}): they were tested on different parts of the "
            "test split, so their figures cannot be compared with each other."
        ]
    return []


def table(comparison: Comparison) -> Table:
    """The students for the terminal, the best first."""
    shown = columns(comparison.groups)
    result = Table(box=None, caption_justify="left", pad_edge=False)
    result.add_column("")
    result.add_column("#", justify="right")
    result.add_column("student", overflow="fold", min_width=24)
    for heading in shown:
        result.add_column(escape(heading), justify="right")
    for group in comparison.first:
        mark = FRONT if group.front else ""
        result.add_row(mark, str(group.number), escape(group.label), *(cell(group) for cell in shown.values()))
    return result


def notes(comparison: Comparison) -> list[str]:
    """What is to be said below the table: marks, runs that did not finish, warnings, the verdict."""
    lines = []
    if any(group.front for group in comparison.groups):
        lines.append(f"{FRONT} on the Pareto front: no other student here is as small and as faithful")
    if comparison.others:
        lines.append(f"{_counted(len(comparison.others), 'more student')} on the page: less faithful and not on the front")
    if any(len(group.runs) > 1 for group in comparison.groups):
        lines.append("± is the sample standard deviation over seeds")
    if comparison.unfinished:
        lines.append(f"not in the table: {tally(comparison.unfinished)}")
        lines += [f"  {each.run.state}: {each.label}: {each.run.reason}" for each in comparison.unfinished if each.run.reason]
    return lines + [f"warning: {warning}" for warning in comparison.warnings] + [comparison.verdict]


def tally(unfinished: Sequence[Unfinished]) -> str:
    """Such as `3 stopped early, 1 failed`."""
    said = {"stopped": "stopped early", "running": "still running"}
    states = Counter(each.run.state for each in unfinished)
    return ", ".join(f"{number} {said.get(state, state)}" for state, number in states.most_common())


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def figures(comparison: Comparison) -> dict[str, Any]:
    """What compare.json holds: every param and figure of every run, and what was made of them."""
    found = comparison.found
    return {
        "of": found.title,
        "mlflow": found.source,
        "search": found.search,
        "verdict": comparison.verdict,
        "warnings": comparison.warnings,
        "students": [_group_figures(group) for group in comparison.groups],
        "unfinished": [{"label": each.label} | _run_figures(each.run) for each in comparison.unfinished],
    }


def _group_figures(group: Group) -> dict[str, Any]:
    names = sorted({name for run in group.runs for name in run.metrics})
    spreads = {name: spread for name in names if (spread := group.spread(name))}
    return {
        "number": group.number,
        "label": group.label,
        "front": group.front,
        "metrics": {name: {"mean": s.mean, "std": s.std, "seeds": len(s.values)} for name, s in spreads.items()},
        "runs": [_run_figures(run) for run in group.runs],
    }


def _run_figures(run: StudentRun) -> dict[str, Any]:
    about = {"run_id": run.id, "name": run.name, "state": run.state, "reason": run.reason}
    return about | {"params": run.params, "metrics": run.metrics, "validation": [list(point) for point in run.curve]}


def render(comparison: Comparison) -> str:
    """The page."""
    return page.render(
        __file__,
        "page.html.jinja",
        c=comparison,
        columns=columns(comparison.groups),
        plots=_drawings(comparison),
        listed=plots.LISTED,
        runs=_counted(len(comparison.found.runs), "run"),
        students=_counted(len(comparison.groups), "finished student"),
        tally=tally(comparison.unfinished),
    )


def _drawings(comparison: Comparison) -> dict[str, str | None]:
    groups = comparison.groups
    return {
        "size": plots.scatter(groups, plots.SIZE),
        "speed": plots.scatter(groups, plots.SPEED),
        "fields": plots.agreement_by_field(groups),
        "curves": plots.learning_curves(groups, comparison.unfinished),
    }
