"""What MLflow costs a training step, by the product's way to MLflow: worker, channel, and a driver that writes to SQLite.

Two costs are measured. The worker *waits* while it hands a parcel to the channel: its share of the training's time. The driver
*computes*: its CPU time over that of all cores, which a training on the same machine loses if it uses every core. A cluster's
training loses the first alone. Measured as shares of the same seconds, as two runs differ by more than what is asked for.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import click
import ray
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.results import keep
from pipeline.base.runtime import start_ray
from pipeline.base.tracking import Tracking, Writer
from pipeline.shards.manifest import open_shards
from student.config import StudentConfig, TrainConfig
from student.train.channel import Sender, open_channel
from student.train.loop import Loop, Training
from student.train.train import POLL


@ray.remote(num_cpus=0)
class Driver:
    """Takes rows from the channel and writes them, as the driver of a training does."""

    def __init__(self, uri: str, channel: Any) -> None:
        self._writer, self._channel = Writer(Tracking.start(uri, "benchmark", "a training", {}, "student")), channel

    def write(self, seconds: float) -> float:
        """For so long; returns the CPU seconds it took."""
        until, before = time.perf_counter() + seconds, time.process_time()
        while time.perf_counter() < until:
            self._writer.add(ray.get(self._channel.take.remote()))
            time.sleep(POLL)
        self._writer.write()
        return time.process_time() - before


def measure(loop: Loop, channel: Any, driver: Any, seconds: float) -> dict[str, float]:
    """Shares of the time that the worker waits and the driver computes."""
    reports = loop.run()
    next(reports)  # warms up
    writing, sender, waited = driver.write.remote(seconds), Sender(channel), 0.0
    first, started = loop.position.step, time.perf_counter()
    while time.perf_counter() - started < seconds:
        report = next(reports)
        before = time.perf_counter()
        sender.add(report.step, report.row)
        waited += time.perf_counter() - before
    took, steps = time.perf_counter() - started, loop.position.step - first
    cpu = ray.get(writing) / (os.cpu_count() or 1)
    return {"step": took / steps, "waits": waited / took, "computes": cpu / took}


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("student", "threads", "ms a step", "the worker waits", "the driver computes", "together", box=None)
    for row in results:
        shares = [row["waits"], row["computes"], row["waits"] + row["computes"]]
        cells = [f"{100 * share:.2f} %" for share in shares]
        table.add_row(row["student"], str(row["threads"]), f"{1000 * row['step']:.1f}", *cells)
    Console(width=128).print(table)


@click.command()
@click.option("--shards", required=True, help="Folder of logit shards.")
@click.option("--seconds", default=30.0, show_default=True, help="Of training, for each student.")
def main(shards: str, seconds: float) -> None:
    """Measures what MLflow costs a training step."""
    start_ray()
    results = []
    for layers, width in ((2, 128), (4, 256)):
        student = StudentConfig(layers=layers, width=width, heads=width // 32, mlp=4 * width, sequence="choices")
        training = Training.of(student, TrainConfig(epochs=1000, batch_size=64), open_shards(shards))
        with tempfile.TemporaryDirectory() as folder:
            channel = open_channel()
            driver = Driver.remote(f"sqlite:///{folder}/mlflow.db", channel)
            ray.get(driver.write.remote(0))  # the store's schema takes seconds
            found = measure(Loop(training, open_shards(shards)), channel, driver, seconds)
        results.append({"student": f"{layers} × {width}", "threads": torch.get_num_threads()} | found)
    show(results)
    keep("tracking", {"results": results})


if __name__ == "__main__":
    main()
