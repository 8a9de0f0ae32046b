"""What MLflow costs a training step: the same steps with the product's way to MLflow and without, in turns.

The way is that of `retort train`: each report of a worker goes into a parcel, the channel takes a parcel every half second,
and the driver, a process of its own, takes what is there and writes it to a fresh SQLite store. In the turns without, reports
are dropped. Between two turns the driver finishes writing, so that no turn pays for another's. The worst case is a small
student on one machine, where the driver takes its CPU time from the training; `--threads` leaves it a core or does not.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import ray
import torch
from rich.console import Console
from rich.table import Table

from cluster.runtime import start_ray
from pipeline.manifest import open_shards
from student.channel import Sender, open_channel
from student.config import StudentConfig, TrainConfig
from student.loop import Loop, Training
from student.train import POLL
from tune.tracking import Tracking

WITH, WITHOUT = "with MLflow", "without"


@ray.remote(num_cpus=0)
class Driver:
    """Takes rows from the channel and writes them, as the driver of a training does."""

    def __init__(self, uri: str, channel: Any) -> None:
        self._tracking, self._channel = Tracking.start(uri, "benchmark", "a training", {}, "student"), channel
        self.rows = 0

    def write(self, seconds: float) -> int:
        """For so long; returns how many rows it has written so far."""
        until = time.perf_counter() + seconds
        while True:
            rows = ray.get(self._channel.take.remote())
            self.rows += len(rows)
            self._tracking.log(rows)
            if time.perf_counter() > until:
                return self.rows
            time.sleep(POLL)


def measure(loop: Loop, channel: Any, driver: Any, turns: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a step in each turn, by kind."""
    times: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    reports = loop.run()
    next(reports)  # warms up
    for turn in range(2 * turns):
        kind = (WITH, WITHOUT)[(turn + turn // 2) % 2]  # with, without, without, with …
        sender = Sender(channel if kind == WITH else None)
        writing = driver.write.remote(seconds) if kind == WITH else None
        first, started = loop.position.step, time.perf_counter()
        while time.perf_counter() - started < seconds:
            report = next(reports)
            sender.add(report.step, report.row)
        times[kind].append((time.perf_counter() - started) / (loop.position.step - first))
        sender.send()
        ray.get([writing, driver.write.remote(0)] if writing else [])
    return times


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("student", "threads", "ms a step without", "with MLflow", "overhead, median of turns (all)", box=None)
    for row in results:
        ratios = row["overhead"]
        every = " ".join(f"{100 * ratio:+.1f}" for ratio in ratios)
        steps = [f"{1000 * median(row['seconds'][kind]):.1f}" for kind in (WITHOUT, WITH)]
        table.add_row(row["student"], str(row["threads"]), *steps, f"{100 * median(ratios):+.2f} % ({every})")
    Console(width=150).print(table)


@click.command()
@click.option("--shards", required=True, help="Folder of logit shards.")
@click.option("--turns", default=6, show_default=True, help="Of each kind.")
@click.option("--seconds", default=8.0, show_default=True, help="Of a turn.")
@click.option("--out", default="runs/benchmarks/tracking.json", show_default=True)
def main(shards: str, turns: int, seconds: float, out: str) -> None:
    """Measures what MLflow costs a training step."""
    start_ray()
    cores, results = os.cpu_count() or 1, []
    for layers, width in ((2, 128), (4, 256)):
        student = StudentConfig(layers=layers, width=width, heads=width // 32, mlp=4 * width, sequence="choices")
        training = Training.of(student, TrainConfig(epochs=1000, batch_size=64), open_shards(shards))
        for threads in sorted({max(1, cores - 1), cores}):
            torch.set_num_threads(threads)
            with tempfile.TemporaryDirectory() as folder:
                channel = open_channel()
                driver = Driver.remote(f"sqlite:///{folder}/mlflow.db", channel)
                times = measure(Loop(training, open_shards(shards)), channel, driver, turns, seconds)
            overhead = [ours / plain - 1 for ours, plain in zip(times[WITH], times[WITHOUT], strict=True)]
            results.append({"student": f"{layers} × {width}", "threads": threads, "seconds": times, "overhead": overhead})
    show(results)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps({"cores": cores, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
