"""How often certificates hold: a student's known answers split at random, again and again, into what chooses, tests and judges.

Of each split, a fifth chooses where to begin, two fifths test, and the rest says whether the answers given alone agree as
often as certified. What is asked for is missed in at most 5 % of the splits.
"""

from __future__ import annotations

from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.results import keep
from student.decode.answerer import WHOLE
from student.evaluate.certificate import Evidence, certify, count
from student.evaluate.evidence import KnownAnswers, load_evidence
from student.model.checkpoint import load_student

TARGETS = (0.9, 0.95, 0.99)


def part(known: Evidence, rows: NDArray[np.int64]) -> Evidence:
    """Some of the texts."""
    return Evidence({n: c[rows] for n, c in known.confidence.items()}, {n: a[rows] for n, a in known.agrees.items()})


def held(known: Evidence, targets: dict[str, float], splits: int) -> dict[str, Any]:
    """Over many splits: the share that gave a certificate, that of these which was missed, and their mean coverage."""
    random, texts = np.random.default_rng(0), len(known.limits(targets))
    missed, coverage = [], []
    for _ in range(splits):
        chooses, tests, judges = (
            part(known, rows) for rows in np.split(random.permutation(texts), [texts // 5, 3 * texts // 5])
        )
        if found := certify(targets, chooses, tests):
            judged = count(found.limit, targets, judges)
            missed.append(any(judged.agreed[name] < share * judged.alone for name, share in targets.items()))
            coverage.append(judged.alone / judged.texts)
    row = {"certified": len(missed) / splits, "missed": sum(missed) / splits}
    return {"targets": targets} | row | {"coverage": float(np.mean(coverage)) if coverage else None}


@click.command(help=__doc__)
@click.option("--student", required=True, metavar="DIR", help="A student that was evaluated.")
@click.option("--splits", default=500, show_default=True)
def main(student: str, splits: int) -> None:
    """Prints and keeps the table."""
    task = load_student(student)[1].task
    parts = load_evidence(student, task)
    confidence, agrees = (getattr(parts.chooses, name) + getattr(parts.tests, name) for name in ("confidence", "agrees"))
    known = KnownAnswers(confidence=confidence, agrees=agrees).evidence(list(task.fields))
    wanted = [{name: share} for name in (WHOLE, *task.fields) for share in TARGETS]
    rows = [held(known, targets, splits) for targets in wanted]
    keep("certificates", {"texts": len(agrees), "splits": splits, "rows": rows})
    table = Table("of", "target", "certified", "missed", "coverage", box=None)
    for row in rows:
        ((name, share),) = row["targets"].items()
        coverage = "-" if row["coverage"] is None else f"{row['coverage']:.1%}"
        table.add_row(name, f"{share:.0%}", f"{row['certified']:.1%}", f"{row['missed']:.1%}", coverage)
    Console().print(table)


if __name__ == "__main__":
    main()
