"""How much of an extraction's time its engine has no model call under way: the teacher's machine waits then.

The product's own actor extracts units of real comments, with the product's engine in its process: one unit at a time, and
as many as Ray Data gives it. The teacher should be small, so that all the rest matters.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import ray
from rich.console import Console
from rich.table import Table

from benchmarks.results import keep

LOG = "RETORT_MODEL_CALLS"  # the variable that names the file of the calls' beginnings and ends


def timed_engine() -> None:
    """The engine's process: as ever, but each model call is written down."""
    from multiprocessing.connection import Connection

    from pipeline.teacher import process, vllm_engine

    attach, log = vllm_engine.CapturingProcessor.attach, os.open(os.environ[LOG], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = call(*args, **kwargs)
            os.write(log, (json.dumps([start, time.perf_counter()]) + "\n").encode())
            return found

        return called

    def attach_timed(self: Any, runner: Any, observes: bool) -> None:
        attach(self, runner, observes)
        runner._model_forward = timed(runner._model_forward)
        runner.model.compute_logits = timed(runner.model.compute_logits)

    vllm_engine.CapturingProcessor.attach = attach_timed  # type: ignore[method-assign]
    process.serve(Connection(int(sys.argv[1])))


def idle_share(calls: list[list[float]], units: int) -> dict[str, float]:
    """What of the time between the first call and the last had none, the first unit left out."""
    calls = calls[len(calls) // units :]
    took = calls[-1][1] - calls[0][0]
    return {"seconds": took, "calls": len(calls), "idle": 1 - sum(end - start for start, end in calls) / took}


@click.command(help=__doc__)
@click.option("--task", required=True)
@click.option("--teacher", required=True)
@click.option("--comments", required=True)
@click.option("--units", default=12, show_default=True)
@click.option("--rows", default=512, show_default=True, help="Of a unit.")
@click.option("--set", "overrides", multiple=True, help="Settings of the extraction.")
def main(task: str, teacher: str, comments: str, units: int, rows: int, overrides: tuple[str, ...]) -> None:
    """Prints and keeps the shares: of one unit at a time, and of as many as under Ray Data."""
    from pipeline.cli.settings import load_config
    from pipeline.extract.extract import prepare_run
    from pipeline.extract.extractor import AT_A_TIME

    rounds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"task": task, "teacher.model": teacher, "comments.paths": [comments], "out": folder}
        options |= {"comments.limit": units * rows, "extract.rows_per_unit": rows}
        extraction, plan, _ = prepare_run(load_config(None, list(overrides), options))
        for beside in (1, AT_A_TIME):
            for shard in Path(extraction.shards).glob("shard-*"):
                shard.unlink()
            log = Path(folder, f"calls-{beside}")
            done = extract(extraction, plan.units, beside, log)
            calls = [json.loads(line) for line in log.read_text().splitlines()]
            rounds[f"units at a time: {beside}"] = {"answers": done} | idle_share(calls, plan.units)
    table = Table("", "answers/s", "model calls", "of the time none under way", box=None)
    for name, found in rounds.items():
        rate = (units - 1) * rows / found["seconds"]
        table.add_row(name, f"{rate:,.0f}", f"{found['calls']:,}", f"{100 * found['idle']:.1f} %")
    Console().print(table)
    keep("idle", {"units": units, "rows": rows, "rounds": rounds})


def extract(extraction: Any, units: int, beside: int, log: Path) -> int:
    """Extracts all units with some at a time, model calls written to a log; returns the answers."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipeline.extract.extractor import UnitExtractor
    from pipeline.extract.monitor import open_monitor
    from pipeline.teacher import process

    os.environ[LOG], start = str(log), process.subprocess.Popen
    own = {"pipeline.teacher.process": "benchmarks.idle"}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = UnitExtractor(extraction, open_monitor(here))
    process.subprocess.Popen = lambda command, **how: start([own.get(part, part) for part in command], **how)
    try:
        with ThreadPoolExecutor(beside) as pool:
            return sum(pool.map(actor._unit, range(units)))
    finally:
        process.subprocess.Popen = start
        if actor._engine:
            actor._engine.close()


if __name__ == "__main__":
    timed_engine() if len(sys.argv) == 2 and sys.argv[1].isdigit() else main()
