"""`make tables`: puts what benchmarks kept in `benchmarks/results/` into the tables of README and docs.

A table's place is marked in Markdown by `<!-- table: NAME -->` before and `<!-- end -->` behind it.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.results import ROOT, has, load

Rows = list[list[str]]

PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
WAYS = {
    "ours": "student, `retort predict`'s way",
    "probabilities": "student, with every value's probability",
    "bf16": "student, weights in bf16",
    "onnx": "student, ONNX Runtime",
    "onnx-int8": "student, ONNX Runtime, 8 bits",
    "same-size": "`transformers` generate, a model of the student's size",
    "jumping": "teacher, Retort's engine on vLLM",
    "vllm": "teacher, vLLM",
    "structured": "teacher, vLLM with structured outputs",
    "transformers": "teacher, `transformers` generate",
}
SHORT = ("ours", "onnx", "same-size", "jumping", "vllm")


def speed() -> Rows:
    """README's: answers a second of a student and its teacher."""
    found = load("inference")
    names = [name for name in SHORT if name in found["results"]]
    rows = [[WAYS[n], f"{found['results'][n]['rate']:,.0f}", digits(found["ratios"][n]["batch"])] for n in names]
    return [["", "answers/s", "× teacher"], *rows]


def inference(name: str = "inference") -> Rows:
    """All of `benchmarks.inference`."""
    found = load(name)
    head = ["", "answers/s", "tokens/s", "p50 ms, one alone", "p99 ms", "× teacher, in batch", "× teacher, alone", "agreement"]
    rows = []
    for way, label in WAYS.items():
        if (row := found["results"].get(way)) is not None:
            ratio = found["ratios"][way]
            agreement = "" if row["agreement"] is None else f"{row['agreement']:.1%}".replace("%", " %")
            rates = [f"{row['rate']:,.0f}", f"{row['token_rate']:,.0f}", digits(row["p50_ms"]), digits(row["p99_ms"])]
            rows.append([label, *rates, digits(ratio["batch"]), digits(ratio["single"]), agreement])
    return [head, *rows]


def extraction() -> Rows:
    """Of `benchmarks.extraction`."""
    from benchmarks.extraction import CONTENDERS

    found = load("extraction")["results"]
    rows = [[CONTENDERS[n].label, f"{row['answers_per_second']:.0f}", f"{row['model_calls']:.1f}"] for n, row in found.items()]
    return [["", "answers/s", "model calls an answer"], *rows]


def codec() -> Rows:
    """Of `benchmarks.codec`."""
    rows = []
    for row in load("codec")["rows"]:
        size, kl = f"{row['bytes_a_step']:,.0f}", f"{row['choice']['kl_mean'][0]:.1g}"
        rows.append([row["name"], size, kl, f"{row['encode_mb_s']:.0f}"])
    return [["", "bytes a step", "KL, nats", "encoded, MB of float16 a second on one core"], *rows]


def idle() -> Rows:
    """Of `benchmarks.idle`."""
    found = load("idle")
    each = (found["units"] - 1) * found["rows"]
    rows = [[name, f"{each / row['seconds']:.0f}", percent(row["idle"])] for name, row in found["rounds"].items()]
    return [["", "answers/s", "of the time no model call under way"], *rows]


def scale() -> Rows:
    """Of `benchmarks.scale`: a stage's seconds, MiB of its driver and of its largest worker, and what a million texts add."""
    rows = load("scale")["rows"]
    counts, stages = (list(dict.fromkeys(row[column] for row in rows)) for column in ("comments", "stage"))
    head = ["", *(f"{count:,} texts" for count in counts), "a million more"]
    lines = []
    for stage in stages:
        mine = {row["comments"]: row for row in rows if row["stage"] == stage}
        cells = [f"{digits(mine[count]['seconds'])} s, {_memory(mine[count])}" if count in mine else "" for count in counts]
        lines.append([stage, *cells, _slope(*list(mine.values())[-2:])])
    return [head, *lines]


def _memory(row: dict[str, Any]) -> str:
    return " + ".join(f"{row[who]:z,.0f}" for who in ("driver", "worker") if row[who]) + " MiB"


def _slope(fewer: dict[str, Any], more: dict[str, Any]) -> str:
    """What a million texts add between two measurements of a stage."""
    millions = (more["comments"] - fewer["comments"]) / 1e6
    slopes = {name: (more[name] - fewer[name]) / millions for name in ("seconds", "driver", "worker")}
    alike = bool(more["worker"]) == bool(fewer["worker"])  # else one had workers, the other did all by itself
    return f"{digits(slopes['seconds'])} s" + (f", {_memory(slopes)}" if alike else "")


def service(name: str) -> Rows:
    """Of `benchmarks.service`."""
    columns = ("rate", "p50_ms", "p99_ms", "alone_p50_ms", "alone_p99_ms")
    rows = [[way, *(digits(row[column]) for column in columns)] for way, row in load(name)["rates"].items()]
    return [["processes", "requests/s, p99 under 50 ms", "p50 ms", "p99 ms", "alone: p50 ms", "p99 ms"], *rows]


def thesis_loop() -> Rows:
    """Of `benchmarks.training --against thesis-loop`; ratios are medians over batches."""
    from benchmarks.thesis_loop import LABELS

    rates = load("thesis_loop")["results"]["examples_per_second"]
    rows = []
    for name, label in LABELS.items():
        against = [_ratio(rates[name], rates[other]) if name != other else "" for other in ("trainer", "loop", "loop-1")]
        rows.append([label, digits(statistics.median(rates[name])), *against])
    return [["", "examples/s", "× Trainer", "× the loop in batches", "× the loop one by one"], *rows]


def pruning() -> Rows:
    """Of `benchmarks.pruning` over many steps."""
    from benchmarks.pruning import WAYS

    rows = load("pruning_converged")["rows"]
    steps = list(rows[0]["mean"])
    head = ["begun", "at once", *(f"after {step} steps" for step in steps[1:])]
    return [head, *([WAYS[row["way"]], *(f"{100 * row['mean'][step]:.1f} %" for step in steps)] for row in rows)]


def starts(name: str = "starts") -> Rows:
    """Of `benchmarks.starts`."""
    from benchmarks.starts import STARTS, cell

    rows = load(name)["rows"]
    counts = sorted({row["examples"] for row in rows})
    head = ["", *(f"{count:,} answers" for count in counts)]
    return [
        head,
        *(
            [label, *(f"{cell(rows, start, count)} %".replace("- %", "") for count in counts)]
            for start, label in STARTS.items()
        ),
    ]


def certificates() -> Rows:
    """Of `benchmarks.certificates`."""
    rows = []
    for row in load("certificates")["rows"]:
        ((name, target),) = row["targets"].items()
        shares = (row[column] for column in ("certified", "missed", "coverage"))
        rows.append([name, percent(target, 0), *("–" if share is None else percent(share) for share in shares)])
    return [["of", "asked", "draws with a certificate", "of these missed", "answered alone"], *rows]


def handover(name: str) -> Rows:
    """Of `benchmarks.handover`."""
    rows = load(name)["rows"]
    cells = [
        [row["who"], percent(row["target"], 0), percent(row["coverage"]), *_kept(row["agreement"], row["target"])]
        for row in rows
    ]
    return [["", "asked", "answered alone", "as the teacher", "kept"], *cells]


def lists() -> Rows:
    """Of `benchmarks.lists`."""
    rows = load("lists")["rows"]
    cells = [[row["who"], percent(row["whole"]), f"{row['micro']:.3f}", f"{row['macro']:.3f}"] for row in rows]
    return [["", "lists right", "F1, micro", "F1, macro"], *cells]


def _kept(agreement: float | None, target: float) -> list[str]:
    return ["–", "–"] if agreement is None else [percent(agreement), "yes" if agreement >= target else "no"]


def kills() -> Rows:
    """Of `benchmarks.kills`: sums over its extractions."""
    runs = load("kills")["runs"]
    sums = {name: sum(run[name] for run in runs) for name in ("rows", "lost", "doubled", "torn", "units", "begun")}
    each = {name: sum((Counter(run[name]) for run in runs), Counter[str]()) for name in ("killed", "requests", "faults")}
    lines = [
        ["kills", ", ".join(f"{count} of {victim}s" for victim, count in sorted(each["killed"].items()))],
        ["requests to the bucket, and those that failed", f"{each['requests'].total():,}, {each['faults'].total():,}"],
        ["of the requests, lists of a folder", f"{each['requests']['LIST']:,}"],
        ["rows; lost, doubled", f"{sums['rows']:,}; {sums['lost']}, {sums['doubled']}"],
        ["shards that were seen before they were whole", f"{sums['torn']}"],
        ["units; begun again", f"{sums['units']:,}; {sums['begun'] - sums['units']}"],
    ]
    return [[f"{len(runs)} extractions", f"{sum(run['seconds'] for run in runs) / 60:.0f} minutes"], *lines]


def grow(name: str = "grow") -> Rows:
    """Of `benchmarks.grow`: means over the seeds."""
    rows = load(name)["rows"]
    counts, ways = (sorted({row[column] for row in rows}, reverse=column == "way") for column in ("calls", "way"))

    def cell(way: str, count: int, column: str) -> str:
        found = [row[column] for row in rows if (row["way"], row["calls"]) == (way, count)]
        return percent(statistics.mean(found)) if found else ""

    head = [f"{way}: {column}" for column in ("agreement", "coverage") for way in ways]
    cells = [[f"{n:,}", *(cell(way, n, column) for column in ("agreement", "coverage") for way in ways)] for n in counts]
    return [["calls", *head], *cells]


def unfamiliar(name: str) -> Rows:
    """Of `benchmarks.unfamiliar`."""
    rows = load(name)["rows"]
    kinds, scores = (list(dict.fromkeys(row[column] for row in rows)) for column in ("texts", "score"))

    def cells(score: str) -> list[str]:
        found = [row for row in rows if row["score"] == score]
        return [cell for row in found for cell in (f"{row['auroc']:.3f}", percent(row["deferred"]["strange"], 0))]

    head = [f"{kind}: {what}" for kind in kinds for what in ("AUROC", "to the teacher")]
    return [["by", *head], *([score, *cells(score)] for score in scores)]


def percent(share: float, digits: int = 1) -> str:
    """A share, for people."""
    return f"{100 * share:.{digits}f} %"


def _ratio(rates: list[float], others: list[float]) -> str:
    return digits(statistics.median(mine / other for mine, other in zip(rates, others, strict=True)))


TABLES: dict[str, tuple[str, Callable[[], Rows]]] = {
    "speed": ("inference", speed),
    "inference": ("inference", inference),
    "inference_minilm": ("inference_minilm", lambda: inference("inference_minilm")),
    "extraction": ("extraction", extraction),
    "codec": ("codec", codec),
    "pruning_converged": ("pruning_converged", pruning),
    "certificates": ("certificates", certificates),
    **{name: (name, partial(handover, name)) for name in ("handover", "handover_clinc", "handover_dev")},
    "lists": ("lists", lists),
    **{name: (name, partial(unfamiliar, name)) for name in ("unfamiliar", "unfamiliar_minilm", "unfamiliar_emotions")},
    "grow": ("grow", grow),
    "grow_clinc": ("grow_clinc", lambda: grow("grow_clinc")),
    "starts": ("starts", starts),
    "starts_clinc": ("starts_clinc", lambda: starts("starts_clinc")),
    "thesis_loop": ("thesis_loop", thesis_loop),
    "idle": ("idle", idle),
    "scale": ("scale", scale),
    "kills": ("kills", kills),
    **{name: (name, partial(service, name)) for name in ("service_own", "service_minilm")},
}


def digits(value: float) -> str:
    """Three digits, two where the number is a ratio below ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"


def table(name: str) -> str:
    """A table in Markdown, and under it what it was measured on."""
    result, make = TABLES[name]
    head, *rows = make()
    lines = [head, ["---"] * len(head), *rows]
    about: dict[str, Any] = load(result)["about"]
    machine, commit = about["machine"], about["commit"]
    source = f"`{about['command']}`, commit {commit}, {about['date']}, {machine['cores']} cores of {machine['cpu']}"
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n<sub>{source}</sub>\n"


def filled(text: str) -> str:
    """Markdown with its marked tables made anew, those whose benchmark kept something."""

    def made(found: re.Match[str]) -> str:
        return found[1] + table(found[2]) + found[3] if has(TABLES[found[2]][0]) else found[0]

    return PLACE.sub(made, text)


def main() -> None:
    """Writes every table into its page."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
