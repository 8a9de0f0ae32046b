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
from benchmarks.results import has, keep, load
from benchmarks.scale import Work, prepare
from benchmarks.tables import kills as kills_table
from tests.integration.bucket import LATE, Bucket
from tests.integration.chaos import VICTIMS, Chaos, rows_once, survive

COMMAND = "from benchmarks.kills import extract; extract()"
ROWS_PER_UNIT = 128
UNITS = 150  # of one extraction
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


def killed_run(name: str, work: Work, bucket: Bucket, rng: random.Random) -> dict[str, Any]:
    """One extraction: what became of its rows and units, whom it lost, and what the bucket saw."""
    folder, out = Path(work.folder, name), f"{bucket.name}/{name}"
    folder.mkdir()
    for file in Path(work.shards).iterdir():
        bucket.write(f"{name}/shards/{file.name}", file.read_bytes())
    named = {"task": work.task, "teacher": work.teacher, "comments": f"{work.folder}/texts", "out": f"s3://{out}"}
    arguments = [*(f"--{name}={value}" for name, value in named.items()), *(f"--set={setting}" for setting in work.overrides)]
    how = {name: os.environ[name] for name in (stand_in.STORED, stand_in.SECONDS)}
    log, began = Path(f"{os.environ[stand_in.STORED]}.log"), time.perf_counter()
    log.write_text("")
    bucket.faults.clear()
    bucket.requests.clear()
    program = [sys.executable, "-c", COMMAND]
    with Chaos(folder, arguments, program, bucket.fs, out, how, PATIENCE, PAUSE, 0.5, 4 * LATE) as chaos:
        survive(chaos, rng.choices(VICTIMS, k=KILLS), rng)
    killed = Counter(victim for victim, there, _ in chaos.struck if there)
    units = {"units": len(chaos.committed()), "begun": len(log.read_text().splitlines())}
    seen = {"requests": dict(bucket.requests), "faults": dict(bucket.faults), "torn": len(bucket.torn)}
    return rows_once(f"s3://{out}") | units | {"killed": dict(killed)} | seen | {"seconds": time.perf_counter() - began}


@click.command(help=__doc__)
@click.option("--task", required=True)
@click.option("--teacher", required=True, help="Whose tokenizer reads; it answers nothing.")
@click.option("--shards", required=True, help="Of that task and teacher: their first answers are given out.")
@click.option("--comments", required=True)
@click.option("--kills", default=300, show_default=True, help="With those of what was kept before.")
@click.option("--share", default=0.015, show_default=True, help="Of the bucket's requests that fail.")
def main(task: str, teacher: str, shards: str, comments: str, kills: int, share: float) -> None:
    """Keeps the counts of each extraction, until there were so many kills, and prints their sums."""
    runs: list[dict[str, Any]] = load("kills")["runs"] if has("kills") else []
    logging.getLogger("ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder, Bucket("retort-kills", share) as bucket:
        settings = (*SETTINGS, f"extract.rows_per_unit={ROWS_PER_UNIT}", f"tracking.uri=sqlite:///{folder}/mlflow.db")
        work = Work(*map(os.path.abspath, (task, teacher)), "", folder, settings)
        prepare(work, shards, comments, UNITS * ROWS_PER_UNIT)
        os.environ |= bucket.settings | bucket.secrets | {stand_in.SECONDS: str(ENGINE_SECONDS)}
        while sum(sum(run["killed"].values()) for run in runs) < kills:
            runs.append(killed_run(f"run-{len(runs)}", work, bucket, random.Random(len(runs))))
            keep("kills", {"runs": runs})
    table = Table(*(rows := kills_table())[0], box=None)
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
