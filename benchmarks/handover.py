"""What a student may answer alone, against what tracer-llm lets its linear models answer: coverage at a certified agreement.

Both know the same texts and the same teacher's answers to one field. A student was trained on the training split and chooses
by the validation split; half of the test split certifies it, or of other texts (`--certify-on`). tracer-llm takes all of that
as traces, with the embeddings of a frozen encoder, in its own settings and without its cap on examples. The other half judges
both.

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
from benchmarks.results import has, keep, load
from pipeline.comments.reading import text_key
from pipeline.shards.manifest import open_shards
from pipeline.task.task import Task
from student.data.answers import teacher_answers
from student.data.examples import open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION, unpack
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


def answers_to(shards: str, field: str, splits: tuple[str, ...]) -> list[tuple[str, str]]:
    """Texts and one field's answers, in the order in which an evaluation reads them."""
    opened, found = open_shards(shards), list[tuple[str, str]]()
    place = list(opened.compiled.task.fields).index(field)
    for split, columns in unpack(opened).items():
        if split in splits and len(columns.get("choice_starts", ())) > 1:
            examples = open_examples(opened, split, "choices")
            answers = [str(values[place]) for values in teacher_answers(examples)]
            found += zip(map(examples.text, range(len(examples))), answers, strict=True)
    return found


def _row(who: str, target: float, coverage: float, agreement: float | None) -> Row:
    return {"who": who, "target": target, "coverage": coverage, "agreement": agreement}


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR")
@click.option("--student", required=True, metavar="DIR", help="Trained on these shards, and evaluated.")
@click.option("--field", required=True, help="Of the answers, which tracer-llm has one of.")
@click.option("--encoder", required=True, metavar="DIR", help="Whose embeddings tracer-llm gets.")
@click.option("--certify-on", "others", metavar="DIR", help="Shards that the student was evaluated with `--certify-on`.")
@click.option("--keep", "name", default="handover", show_default=True, help="Name of the result.")
def main(shards: str, student: str, field: str, encoder: str, others: str | None, name: str) -> None:
    """Prints and keeps the table."""
    task = open_shards(shards).compiled.task
    trained = answers_to(shards, field, (TRAIN,))
    first, later = [*trained, *answers_to(shards, field, (VALIDATION,))], answers_to(shards, field, (TEST,))
    if others:  # as `retort evaluate` takes them
        seen = {text_key(text) for text, _ in trained}
        given = dict(answers_to(others, field, (TRAIN, VALIDATION, TEST)))
        later = [(text, answer) for text, answer in given.items() if text_key(text) not in seen]
    order = np.random.default_rng(0).permutation(len(later))
    certifies, judges = np.split(order, [len(order) // 2])
    known, unseen = [*first, *(later[i] for i in certifies)], [later[i] for i in judges]
    texts, labels = map(list, zip(*known, strict=True))
    new_texts, new_labels = map(list, zip(*unseen, strict=True))
    embeddings, new_embeddings = embed(encoder, texts), embed(encoder, new_texts)
    rows, before = ours(student, task, field, certifies, judges), load(name)["rows"] if has(name) else []
    for settings in SETTINGS:
        known_rows = [row for row in before if row["who"] == settings]  # of a run that was stopped
        rows += known_rows or theirs(settings, (texts, labels, embeddings), (new_labels, new_embeddings))
        keep(name, {"field": field, "known": len(known), "judged": len(judges), "rows": rows})  # each takes minutes
    table = Table("who", "certified", "coverage", "agreement of these", box=None)
    for row in rows:
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.1%}"
        table.add_row(row["who"], f"{row['target']:.0%}", f"{row['coverage']:.1%}", agreement)
    Console().print(table)


if __name__ == "__main__":
    main()
