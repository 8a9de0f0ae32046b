"""A growth for people: lines and a table for the terminal, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from pipeline.base import page
from pipeline.base.page import percent
from pipeline.base.plots import INK, STUDENT, TRAIN, svg
from student.decode.answerer import WHOLE
from student.evaluate.certificate import Targets

if TYPE_CHECKING:
    from tune.grow.grow import Round


def sentence(done: Round) -> str:
    """A round in one line."""
    alone = "nothing is certified yet" if done.coverage is None else f"certified to answer {percent(done.coverage)} alone"
    return f"after {done.calls:,} calls: {percent(done.agreement)} of test answers are the teacher's, {alone}"


def rows(rounds: Sequence[Round]) -> list[dict[str, str]]:
    """Cells by heading."""
    return [
        {
            "calls": f"{done.calls:,}",
            "agreement": percent(done.agreement),
            "alone, by validation": percent(done.alone),
            "alone, certified": percent(done.coverage),
            "training": page.duration(done.seconds),
        }
        for done in rounds
    ]


def table(rounds: Sequence[Round]) -> Table:
    """For the terminal."""
    return page.table("grown", rows(rounds))


def render(task: str, targets: Targets, rounds: Sequence[Round]) -> str:
    """The page."""
    wanted = ", ".join(f"{100 * share:.4g} % of {'answers' if name == WHOLE else name}" for name, share in targets.items())
    return page.render(
        __file__, "page.html.jinja", task=task, wanted=wanted, rows=rows(rounds), last=sentence(rounds[-1]), plot=_plot(rounds)
    )


def _plot(rounds: Sequence[Round]) -> str:
    """Agreement and coverage against calls."""
    calls = [done.calls for done in rounds]
    with svg(1, 6.2, 3.8) as (drawing, (axes,)):
        axes.plot(calls, [100 * done.agreement for done in rounds], "o-", ms=4, color=STUDENT, label="agreement")
        axes.plot(calls, [100 * done.alone for done in rounds], "o--", ms=4, color=TRAIN, label="answered alone, by validation")
        axes.plot(calls, [100 * (done.coverage or 0) for done in rounds], "o-", ms=4, color=INK, label="the same, certified")
        axes.set(xlabel="texts the teacher was asked about", ylabel="% of test comments", xlim=(0, None), ylim=(0, 100))
        axes.legend(fontsize=8, loc="lower right")
    return drawing.uri
