"""What a student may answer alone, against what tracer-llm lets its linear models answer: coverage at a certified agreement.

Both know the same texts and the same teacher's answers to one field. A student was trained on the training split and chooses
by the validation split; half of the test split certifies it. tracer-llm takes all of that as traces, with the embeddings of a
frozen encoder, in its own settings and without its cap on examples. The other half of the test split judges both.

tracer-llm 0.3.3 asks for an older numpy than Retort has; `pip install --no-deps tracer-llm==0.3.3` runs with the newer one.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.certificates import part
from benchmarks.results import keep
from pipeline.shards.manifest import open_shards
from pipeline.task.task import Task
from student.data.answers import teacher_answers
from student.data.examples import open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION
from student.evaluate.certificate import certify, count
from student.evaluate.embeddings import embed
from student.evaluate.evidence import load_evidence

Row = dict[str, Any]

TARGETS = (0.9, 0.95, 0.97)
SETTINGS: dict[str, dict[str, Any]] = {
    "tracer-llm": {"skip_candidates": ("gbt",)},  # gradient boosting over many classes takes hours
    # its sweep never took these of trees, and they would take hours of 40,000 examples
    "tracer-llm, all examples": {"skip_candidates": ("gbt", "sgd_log", "dt", "rf", "et"), "max_fit_labels": 10**6},
}


def ours(student: str, task: Task, field: str, certifies: NDArray[np.int64], judges: NDArray[np.int64]) -> list[Row]:
    """The student's coverage and agreement at each target."""
    held = load_evidence(student, task)
    rows = []
    for target in TARGETS:
        chooses, tests, _ = held.evidence(list(task.fields), {field: target})
        found = certify({field: target}, chooses, part(tests, certifies))
        judged = count(found.limit, {field: target}, part(tests, judges)) if found else None
        alone, agreed = (judged.alone, judged.agreed[field]) if judged else (0, 0)
        rows.append(_row("student", target, alone / len(judges), agreed / alone if alone else None))
    return rows


def theirs(name: str, known: tuple[list[str], list[str], Any], unseen: tuple[list[str], Any]) -> list[Row]:
    """tracer-llm's coverage and agreement at each target.

    Args:
        known: texts, their answers and their embeddings.
        unseen: answers and embeddings.
    """
    tracer = importlib.import_module("tracer")
    texts, answers, embeddings = known
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        traces = Path(folder, "traces.jsonl")
        traces.write_text("".join(json.dumps({"input": t, "teacher": a}) + "\n" for t, a in zip(texts, answers, strict=True)))
        for target in TARGETS:
            started = time.perf_counter()
            config = tracer.FitConfig(target_teacher_agreement=target, frontier_targets=(target,), **SETTINGS[name])
            tracer.fit(traces, Path(folder, str(target)), embeddings, config)
            try:
                routed = tracer.load_router(Path(folder, str(target))).predict_batch(unseen[1])
            except ValueError:  # its gate let nothing pass
                rows.append(_row(name, target, 0.0, None))
                continue
            handled = np.asarray(routed["handled"])
            equal = np.array([mine == theirs for mine, theirs in zip(routed["labels"], unseen[0], strict=True)])
            agreement = float(equal[handled].mean()) if handled.any() else None
            rows.append(_row(name, target, float(handled.mean()), agreement) | {"seconds": time.perf_counter() - started})
    return rows


def _row(who: str, target: float, coverage: float, agreement: float | None) -> Row:
    return {"who": who, "target": target, "coverage": coverage, "agreement": agreement}


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR")
@click.option("--student", required=True, metavar="DIR", help="Trained on these shards, and evaluated.")
@click.option("--field", required=True, help="Of the answers, which tracer-llm has one of.")
@click.option("--encoder", required=True, metavar="DIR", help="Whose embeddings tracer-llm gets.")
@click.option("--keep", "name", default="handover", show_default=True, help="Name of the result.")
def main(shards: str, student: str, field: str, encoder: str, name: str) -> None:
    """Prints and keeps the table."""
    opened = open_shards(shards)
    place = list(opened.compiled.task.fields).index(field)
    texts: dict[str, list[str]] = {}
    answers: dict[str, list[str]] = {}
    for split in (TRAIN, VALIDATION, TEST):
        examples = open_examples(opened, split, "choices")
        texts[split] = [examples.text(i) for i in range(len(examples))]
        answers[split] = [str(values[place]) for values in teacher_answers(examples)]
    order = np.random.default_rng(0).permutation(len(texts[TEST]))
    certifies, judges = np.split(order, [len(order) // 2])
    known = [*texts[TRAIN], *texts[VALIDATION], *(texts[TEST][i] for i in certifies)]
    labels = [*answers[TRAIN], *answers[VALIDATION], *(answers[TEST][i] for i in certifies)]
    embeddings, unseen = embed(encoder, known), embed(encoder, [texts[TEST][i] for i in judges])
    rows = ours(student, opened.compiled.task, field, certifies, judges)
    for settings in SETTINGS:
        rows += theirs(settings, (known, labels, embeddings), ([answers[TEST][i] for i in judges], unseen))
        keep(name, {"field": field, "known": len(known), "judged": len(judges), "rows": rows})  # each takes minutes
    table = Table("who", "certified", "coverage", "agreement of these", box=None)
    for row in rows:
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.1%}"
        table.add_row(row["who"], f"{row['target']:.0%}", f"{row['coverage']:.1%}", agreement)
    Console().print(table)


if __name__ == "__main__":
    main()
