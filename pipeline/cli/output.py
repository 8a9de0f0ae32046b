"""What commands say at their end: tables of figures, and where the files are."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pipeline.base import storage
from pipeline.base.console import console, say

if TYPE_CHECKING:
    from tune.compare.page import Comparison


def show_comparison(comparison: Comparison, folder: str) -> None:
    """The table of students, what is to be said of it, and where the page is."""
    from tune.compare.page import PAGE, notes, table

    if comparison.groups:
        console.print(table(comparison))
    say(*notes(comparison))
    say(f"page     {storage.join(folder, PAGE)}")


def show_report(figures: dict[str, Any], shards: str, student: str, report: str, mlflow: str | None = None) -> None:
    """The report's headline, and where everything is."""
    from student.data.answers import REFERENCES
    from student.evaluate.verdict import named, verdict

    agreement = f"agreement with {REFERENCES[figures['answers']].name}"
    table = Table(agreement, "valid", "whole answer", *map(escape, figures["student"]["fields"]), box=None)
    rows = {
        "student": figures["student"],
        "student, unconstrained": figures["unconstrained"],
    } | named(figures["floors"])
    for label, row in rows.items():
        table.add_row(label, *(f"{100 * share:.1f} %" for share in (row["valid"], row["whole"], *row["fields"].values())))
    console.print(table)
    speed, kl = figures["speed"], figures["steps"]["choice_kl"]
    ratio = "" if speed["ratio"] is None else f", {speed['ratio']:.1f} × the teacher"
    steps = "" if kl is None else f"; KL {kl:.4f} nats a choice step"
    console.print(f"{speed['student_answers_per_second']:,.0f} answers/s{ratio}{steps}")
    page, file = storage.join(report, "fidelity.html"), storage.join(report, "fidelity.json")
    for what, where in {"report": page, "figures": file, "student": student, "shards": shards}.items():
        say(f"{what:8} {where}")
    if mlflow:
        command = f"mlflow server --backend-store-uri {shlex.quote(mlflow)} --host 127.0.0.1 --port 5000"
        say(f"MLflow   {command}\n         then open http://127.0.0.1:5000")
    say(*reversed(verdict(figures)))  # the verdict itself last, where it is seen
