"""`--memory true-size` of `benchmarks.training`: the most memory that training the thesis' student takes.

It trains for a few steps, in one process and in two by DistributedDataParallel. Each process is a fresh one, as the peak of a
process never falls.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.students import Contender, Data, peak_gib
from student.config import TrainConfig
from student.train.order import Order, parts

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {1: 14, 2: 22}  # GiB asked of true-size students, by workers


def train_share(data: Data, config: TrainConfig, rank: int, workers: int, meeting: str, steps: int) -> dict[str, float]:
    """One worker's part of a few steps, and its peak memory."""
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    contender, start = Contender(data, config, torch.device("cpu")), time.perf_counter()
    for indices in itertools.islice(Order(data.examples.lengths, config).epoch(1), steps):
        mine = parts(indices, rank, workers, 1)[0]
        contender.step(indices, contender.batches(mine))
    if workers > 1:
        dist.destroy_process_group()
    return {"peak_gib": peak_gib(torch.device("cpu")), "seconds": time.perf_counter() - start} | contender.counts


def available_gib() -> float:
    """Memory that is free on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def memory(command: list[str], counts: tuple[int, ...]) -> dict[str, Any]:
    """Peak memory of true-size students, in fresh processes that run the command, for each number of workers."""
    results = {}
    for workers in counts:
        if available_gib() < LIMITS[workers]:
            print(
                f"{workers} workers left out: {available_gib():.1f} GiB are free, {LIMITS[workers]} are asked", file=sys.stderr
            )
            continue
        results[str(workers)] = _workers(command, workers)
    return results


def _workers(command: list[str], workers: int) -> list[dict[str, float]]:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    with tempfile.TemporaryDirectory() as folder:
        common = [*command, f"--meeting={folder}/meeting", f"--workers={workers}"]
        started = [
            subprocess.Popen(
                [*common, f"--rank={rank}"],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": threads},
            )
            for rank in range(workers)
        ]
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a worker failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def show_memory(results: dict[str, Any]) -> None:
    """The table."""
    table = Table("workers", "peaks, GiB", "together", "asked", "parameters, M", "of the embedding", "seconds", box=None)
    for workers, rows in results.items():
        peaks = [row["peak_gib"] for row in rows]
        sizes = [f"{rows[0][name] / 1e6:.0f}" for name in ("rest", "embedding")]
        each, limit = " ".join(f"{peak:.2f}" for peak in peaks), f"under {LIMITS[int(workers)]}"
        table.add_row(workers, each, f"{sum(peaks):.2f}", limit, *sizes, f"{rows[0]['seconds']:.0f}")
    Console(width=128).print(table)
