"""docs/handover.png: what `benchmarks.handover` and `benchmarks.grow` kept, as a picture.

python -m benchmarks.handover_plot docs/handover.png
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import has, load
from pipeline.base.plots import STYLE

TASKS = {"": "28 emotions", "_clinc": "150 intents"}  # by the end of a result's name
LOOKS = {"student": "o-", "tracer-llm": "s:", "tracer-llm, all examples": "s--", "chosen": "o-", "random": "s:"}


def against(axes: Axes, rows: Iterable[dict[str, Any]], of: str, x: str, y: str, prefix: str = "", **look: Any) -> None:
    """Draws a line for each kind of rows, by the mean over their seeds, in percent.

    Args:
        of: the column that tells the kinds apart.
    """
    rows = list(rows)
    for kind in dict.fromkeys(row[of] for row in rows):
        places = sorted({row[x] for row in rows if row[of] == kind})
        means = [100 * np.mean([row[y] or 0 for row in rows if (row[of], row[x]) == (kind, place)]) for place in places]
        axes.plot(
            [f"{100 * p:g} %" if x == "target" else p for p in places], means, LOOKS[kind], label=prefix + kind, ms=4, **look
        )


@click.command(help=__doc__)
@click.argument("path")
def main(path: str) -> None:
    """Draws coverage by certified agreement beside tracer-llm, and both of a growing student by calls."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        alone, agreement, coverage = figure.subplots(1, 3)
        for place, (end, task) in enumerate(TASKS.items()):
            look = {"color": f"C{place}", "lw": 1.2}
            if has(f"handover{end}"):
                against(alone, load(f"handover{end}")["rows"], "who", "target", "coverage", f"{task}: ", **look)
            for axes, column in ((agreement, "agreement"), (coverage, "coverage")):
                against(axes, load(f"grow{end}")["rows"], "way", "calls", column, f"{task}: ", **look)
        alone.set(xlabel="certified agreement", ylabel="answered alone, % of texts", ylim=(-3, 103))
        agreement.set(xlabel="calls of the teacher", ylabel="whole answers as the teacher's, %")
        coverage.set(xlabel="calls of the teacher", ylabel="answered alone at a certified 90 %, %", ylim=(-3, 103))
        for axes in (agreement, coverage):
            axes.locator_params(axis="x", nbins=5)
        alone.legend(fontsize=7)
        agreement.legend(fontsize=7)
        figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
