"""How often certificates hold: a student's known answers stand for all texts, and parts of them are drawn again and again.

Of the answers, a fifth chooses where to begin, and from the rest, which is all texts there are here, as many as half of it are
drawn at random with replacement to test. So the agreement that is certified is known, and may be missed in 5 % of the draws.
`unseen` is how often fewer agree than certified among those that were not drawn: an estimate of that, with chance of its own.
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
from student.evaluate.certificate import Counts, Evidence, certify, count, coverage
from student.evaluate.evidence import KnownAnswers, load_evidence
from student.model.checkpoint import load_student

TARGETS = (0.9, 0.95, 0.99)


def part(known: Evidence, rows: NDArray[np.int64]) -> Evidence:
    """Some of the texts."""
    return Evidence({n: c[rows] for n, c in known.confidence.items()}, {n: a[rows] for n, a in known.agrees.items()})


def held(ways: list[Evidence], targets: dict[str, float], draws: int) -> dict[str, Any]:
    """Over many draws: the share that gave a certificate, that of these which was missed, and their mean coverage."""
    random, texts = np.random.default_rng(0), len(ways[0].limits(targets))
    missed, unseen, covered = [], [], []
    for _ in range(draws):
        chooses, rest = np.split(random.permutation(texts), [texts // 5])
        tests = random.choice(rest, len(rest) // 2)
        known = max(ways, key=lambda way: coverage(targets, part(way, chooses)))  # as `Held.evidence` has it
        if found := certify(targets, part(known, chooses), part(known, tests)):
            judged = count(found.limit, targets, part(known, rest))
            missed.append(_fails(judged, targets))
            unseen.append(_fails(count(found.limit, targets, part(known, np.setdiff1d(rest, tests))), targets))
            covered.append(judged.alone / judged.texts)
    row = {"certified": len(missed) / draws, "missed": sum(missed) / draws, "unseen": sum(unseen) / draws}
    return {"targets": targets} | row | {"coverage": float(np.mean(covered)) if covered else None}


def _fails(judged: Counts, targets: dict[str, float]) -> bool:
    return any(judged.agreed[name] < share * judged.alone for name, share in targets.items())


@click.command(help=__doc__)
@click.option("--student", required=True, metavar="DIR", help="A student that was evaluated.")
@click.option("--draws", default=500, show_default=True)
def main(student: str, draws: int) -> None:
    """Prints and keeps the table."""
    task = load_student(student)[1].task
    parts = load_evidence(student, task)
    confidence, agrees = (getattr(parts.chooses, name) + getattr(parts.tests, name) for name in ("confidence", "agrees"))
    known = KnownAnswers(confidence=confidence, agrees=agrees)
    ways = [known.evidence(list(task.fields), together) for together in (False, True)]
    wanted = [{name: share} for name in (WHOLE, *task.fields) for share in TARGETS]
    rows = [held(ways, targets, draws) for targets in wanted]
    keep("certificates", {"texts": len(agrees), "draws": draws, "rows": rows})
    table = Table("of", "target", "certified", "missed", "unseen", "coverage", box=None)
    for row in rows:
        ((name, target),) = row["targets"].items()
        share = "-" if row["coverage"] is None else f"{row['coverage']:.1%}"
        table.add_row(name, f"{target:.0%}", f"{row['certified']:.1%}", f"{row['missed']:.1%}", f"{row['unseen']:.1%}", share)
    Console().print(table)


if __name__ == "__main__":
    main()
