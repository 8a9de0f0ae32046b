"""Rows lost and doubled, and units done again, when an extraction's driver, actors, engines and machines die at random.

Ray's machines are two on this one, and all files are in a bucket whose endpoint fails in some requests: errors, late answers,
cut connections. The engine gives out stored answers after a fixed time (`benchmarks.stand_in`); all else is the product. One
extraction after another is killed, each so often that its units last, and then runs to its end.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import stand_in
from benchmarks.results import keep
from benchmarks.scale import Work, prepare
from tests.integration.bucket import LATE, Bucket
from tests.integration.chaos import VICTIMS, Chaos, rows_once, survive

COMMAND = "from benchmarks.kills import extract; extract()"
ROWS_PER_UNIT = 128
UNITS = 400  # of one extraction
KILLS = 40  # of one extraction
ENGINE_SECONDS = 1.0  # of a unit
PATIENCE, PAUSE = 1 / 4, 2.0  # of kills, those that wait for a new shard; and seconds at most before one
SETTINGS = ("teacher.actors=2", "extract.capture=choices", "extract.codec=compact")


def extract() -> None:
    """The product's command with the stand-in's engine, in a process of its own."""
    from pipeline.cli.main import main as command
    from pipeline.extract import extract as stage

    stage.UnitExtractor = stand_in.StandInExtractor  # type: ignore[misc]
    command(["extract", *sys.argv[1:]])


def killed_run(number: int, work: Work, bucket: Bucket, victims: list[str], rng: random.Random) -> dict[str, Any]:
    """One extraction: what became of its rows, its units done, and whom it lost when."""
    folder, out = Path(work.folder, f"run-{number}"), f"{bucket.name}/run-{number}"
    folder.mkdir()
    for file in Path(work.shards).iterdir():
        bucket.write(f"run-{number}/shards/{file.name}", file.read_bytes())
    for name in bucket.files() if number else []:  # one plan is enough
        if name.startswith("run-0/comments/"):
            bucket.fs.copy_file(f"{bucket.name}/{name}", f"{bucket.name}/{name.replace('run-0', f'run-{number}')}")
    named = {"task": work.task, "teacher": work.teacher, "comments": f"{work.folder}/texts", "out": f"s3://{out}"}
    arguments = [*(f"--{name}={value}" for name, value in named.items()), *(f"--set={setting}" for setting in work.overrides)]
    how = {name: os.environ[name] for name in (stand_in.STORED, stand_in.SECONDS)}
    log, began = Path(f"{os.environ[stand_in.STORED]}.log"), time.perf_counter()
    log.write_text("")
    with Chaos(
        folder, arguments, [sys.executable, "-c", COMMAND], bucket.fs, out, how, PATIENCE, PAUSE, 0.5, 4 * LATE
    ) as chaos:
        survive(chaos, victims, rng)
    there = Counter(victim for victim, there, _ in chaos.struck if there)
    begun = len(log.read_text().splitlines())
    return rows_once(f"s3://{out}") | {"units": len(chaos.committed()), "begun": begun, "killed": dict(there)} | {
        "seconds": time.perf_counter() - began
    }  # fmt: skip


def summary(runs: list[dict[str, Any]], bucket: Bucket) -> dict[str, Any]:
    """Of all runs, and of the requests to the bucket."""
    found = {name: sum(run[name] for run in runs) for name in ("rows", "lost", "doubled", "units", "begun", "seconds")}
    killed = sum((Counter(run["killed"]) for run in runs), Counter[str]())
    seen = {"torn": len(bucket.torn), "read": bucket.read}
    return found | {"killed": dict(killed), "faults": dict(bucket.faults), "requests": dict(bucket.requests)} | seen


@click.command(help=__doc__)
@click.option("--task", required=True)
@click.option("--teacher", required=True, help="Whose tokenizer reads; it answers nothing.")
@click.option("--shards", required=True, help="Of that task and teacher: their first answers are given out.")
@click.option("--comments", required=True)
@click.option("--kills", default=300, show_default=True)
@click.option("--share", default=0.015, show_default=True, help="Of the bucket's requests that fail.")
@click.option("--seed", default=0, show_default=True)
def main(task: str, teacher: str, shards: str, comments: str, kills: int, share: float, seed: int) -> None:
    """Prints and keeps the counts."""
    rng, runs = random.Random(seed), list[dict[str, Any]]()
    victims = [rng.choice(VICTIMS) for _ in range(kills)]
    logging.getLogger("ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder, Bucket("retort-kills", share) as bucket:
        settings = (*SETTINGS, f"extract.rows_per_unit={ROWS_PER_UNIT}", f"tracking.uri=sqlite:///{folder}/mlflow.db")
        work = Work(*map(os.path.abspath, (task, teacher)), "", folder, settings)
        prepare(work, shards, comments, UNITS * ROWS_PER_UNIT)
        os.environ |= bucket.settings | bucket.secrets | {stand_in.SECONDS: str(ENGINE_SECONDS)}
        for number, start in enumerate(range(0, max(1, kills), KILLS)):
            runs.append(killed_run(number, work, bucket, victims[start : start + KILLS], rng))
            print(runs[-1], file=sys.stderr)
            found = summary(runs, bucket)
            keep("kills", found)
    table = Table("", "", box=None, show_header=False)
    for name, count in found.items():
        table.add_row(name, str(count))
    Console().print(table)


if __name__ == "__main__":
    main()
