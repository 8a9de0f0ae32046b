"""Answers a second and latency of a student and its teacher: ours, ONNX Runtime, `transformers` and vLLM, on the same comments.

Each contender runs in a process of its own with all cores, goes from a comment's text to the values of an answer, and takes
turns with the others over some rounds; the median of the rounds counts. Each answers many comments at once, then others one
after another. An answer counts as many tokens as its text has under the teacher's tokenizer, end token included, however few
of them the contender computed.

The teacher under vLLM, which ratios are taken to, is the fastest of its three ways: free, as this teacher keeps the format by
itself, held to the task's answers by structured outputs, or under Retort's engine, which skips forced tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.inference_contenders import CONTENDERS, Question
from benchmarks.results import keep
from pipeline.shards.manifest import open_shards

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, SINGLE_WARM_UP = 256, 8  # comments
LEAST_SECONDS = 1.0  # of one round's batches: all comments are answered again until then
TEACHER = ("vllm", "structured", "jumping")  # ways of the teacher under vLLM, our engine among them
ASKED = {"batch": 20, "single": 50, "agreement": 0.8, "size": 0.25}


def load_question(shards: str, student: str, teacher: str | None, export: str | None, count: int, singles: int = 0) -> Question:
    """Comments of the test split with the answers the teacher gave in the extraction."""
    from student.data.answers import teacher_answers
    from student.data.examples import open_examples
    from student.data.unpack import TEST

    opened = open_shards(shards)
    test = open_examples(opened, TEST, "choices").first(WARM_UP + singles + count)
    texts, model = [test.text(i) for i in range(len(test))], teacher or opened.manifest.teacher.model
    return Question(student, model, export, opened.compiled, texts, teacher_answers(test))


def measure(name: str, question: Question, singles: int) -> dict[str, Any]:
    """One round of one contender, in this process."""
    contender = CONTENDERS[name]
    run = contender.start(question)
    run(question.texts[:WARM_UP])
    for text in question.texts[:SINGLE_WARM_UP]:
        run([text])
    texts, truth = question.texts[WARM_UP:], question.truth[WARM_UP:]
    alone = texts[: min(singles, contender.singles or singles)]
    count = len(texts) - singles
    together = slice(len(alone), len(alone) + min(count, contender.rows or count))  # prefix caches know those before
    milliseconds = [1000 * seconds_of(lambda text=text: run([text])) for text in alone]
    passes, answers = [], []
    while sum(passes) < LEAST_SECONDS:
        passes.append(seconds_of(lambda: answers.extend(run(texts[together]))))
    truth = truth[together]
    answers = answers[: len(truth)]
    lengths = question.lengths([given if found is None else found for found, given in zip(answers, truth, strict=True)])
    rate = len(truth) / statistics.median(passes)
    return {
        "rate": rate,
        "token_rate": rate * statistics.mean(lengths),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "agreement": None if name == "same-size" else float(np.mean([a == b for a, b in zip(answers, truth, strict=True)])),
        "rows": len(truth),
        "singles": len(alone),
    }


def seconds_of(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_process_of_its_own(
    script: str, name: str, arguments: list[str], limit: float, threads: int | None = None
) -> dict[str, Any]:
    """The same measurement in a fresh process, with the environment of an extraction's engines; by default on all cores."""
    from pipeline.config import TeacherConfig
    from pipeline.teacher.engines import engine_environment

    environment = os.environ | engine_environment(TeacherConfig(threads=threads)) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, *arguments, "--only", name]
    load = os.getloadavg()[0]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"load_before": load}


def take_turns(names: list[str], rounds: int, once: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Some rounds of all contenders: medians of what is a number, and the rounds themselves."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name, done in found.items():
            done.append(once(name))
            figures = ", ".join(f"{key} {value:.4g}" for key, value in done[-1].items() if value is not None)
            print(f"round {number + 1} {name}: {figures}", file=sys.stderr, flush=True)
    return {
        name: {key: _median([one[key] for one in done]) for key in done[0]} | {"rounds": done} for name, done in found.items()
    }


def _median(values: list[Any]) -> Any:
    return None if None in values else statistics.median(values)


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each contender's answers a second and latency against the fastest way of the teacher under vLLM."""
    ways = [results[name] for name in TEACHER if name in results]
    if not ways:
        return {name: {} for name in results}
    rate, latency = max(way["rate"] for way in ways), min(way["p50_ms"] for way in ways)
    return {name: {"batch": row["rate"] / rate, "single": latency / row["p50_ms"]} for name, row in results.items()}


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    """The medians, how far the rounds were apart, and the ratios to the teacher under vLLM."""
    heads = ("answers/s", "spread", "tokens/s", "p50 ms", "spread", "p99 ms", "× batch", "× single", "agreement")
    table = Table("", *heads, box=None)
    for (name, row), against in zip(results.items(), ratios(results).values(), strict=True):
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.1%}"
        each = [f"{against[way]:.3g}" if against else "-" for way in ("batch", "single")]
        speeds = (f"{row['rate']:,.0f}", _spread(row, "rate", ",.0f"), f"{row['token_rate']:,.0f}")
        waits = (f"{row['p50_ms']:.2f}", _spread(row, "p50_ms", ".2f"), f"{row['p99_ms']:.2f}")
        table.add_row(CONTENDERS[name].label, *speeds, *waits, *each, agreement)
    return table


def _spread(row: dict[str, Any], key: str, form: str) -> str:
    values = [one[key] for one in row["rounds"]]
    return f"{min(values):{form}} to {max(values):{form}}"


def asked_for(results: dict[str, dict[str, Any]], sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What is asked of our student, what it gives, and whether that is enough; of the contenders that ran."""
    found = {"size": sizes["student"] / sizes["teacher"]}
    if "ours" in results:
        found |= {"agreement": results["ours"]["agreement"]} | ratios(results)["ours"]
    enough = {name: value <= ASKED[name] if name == "size" else value >= ASKED[name] for name, value in found.items()}
    return {name: {"found": value, "asked": ASKED[name], "met": enough[name]} for name, value in found.items()}


def sizes_of(shards: str, student: str) -> dict[str, int]:
    """Parameters of both models, embeddings included."""
    from student.model.checkpoint import load_student

    counts = load_student(student)[0].parameter_counts()
    return {"student": sum(counts.values()), "teacher": open_shards(shards).manifest.teacher.parameters}


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR", help="An extraction; its test split is what is answered.")
@click.option("--student", required=True, metavar="DIR", help="A student of these shards.")
@click.option("--teacher", metavar="DIR", help="A local model; by default the one the shards were extracted from.")
@click.option("--export", metavar="DIR", help="What `retort export` wrote; without it ONNX Runtime is left out.")
@click.option("--comments", "count", default=2000, show_default=True, help="At once; slow contenders get fewer.")
@click.option("--singles", default=500, show_default=True, help="One after another; slow contenders get fewer.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--threads", type=int, help="Of each contender; by default one for each core.")
@click.option("--contender", "names", multiple=True, type=click.Choice(list(CONTENDERS)), help="By default all.")
@click.option("--keep", "name", default="inference", show_default=True, help="Name of the results; `inference_minilm` is one.")
@click.option("--only", type=click.Choice(list(CONTENDERS)), hidden=True)
def main(
    rounds: int, threads: int | None, names: tuple[str, ...], name: str, only: str | None, singles: int, **options: Any
) -> None:
    """Times every contender and prints the table."""
    if only:
        print(json.dumps(measure(only, load_question(**options, singles=singles), singles)))
        return
    arguments = [f"--{ {'count': 'comments'}.get(key, key) }={value}" for key, value in options.items() if value is not None]
    arguments.append(f"--singles={singles}")
    chosen = [each for each in names or CONTENDERS if options["export"] or not each.startswith("onnx")]
    if not options["export"]:
        print("no --export: ONNX Runtime is left out", file=sys.stderr)
    results = take_turns(chosen, rounds, lambda each: in_process_of_its_own(__file__, each, arguments, 900, threads))
    sizes = sizes_of(options["shards"], options["student"])
    asked = asked_for(results, sizes)
    Console(width=140).print(table_of(results))
    for what, row in asked.items():
        print(f"{what}: {row['found']:.3g}, asked {row['asked']}: {'met' if row['met'] else 'missed'}")
    found = {"parameters": sizes, "asked": asked, "ratios": ratios(results), "results": results}
    keep(name, {"threads": threads or os.cpu_count()} | found)


if __name__ == "__main__":
    main()
