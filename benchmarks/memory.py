"""Peak memory of an extraction's driver as the number of comments grows, on a tiny teacher with random weights.

The driver plans, calibrates, watches the actors and derives the manifest; none of it may hold the rows. Its memory is that
of its own process, not of Ray's or the engine's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.results import keep

ROOT = Path(__file__).resolve().parent.parent
TASK = """
name: tiny
teacher: none
instruction: Judge.
fields: {mood: [good, bad], loud: {type: boolean}}
comments: {max_tokens: 40}
context: 90
auxiliary_tokens: 20
"""
DRIVER = """
import resource, sys
from pipeline.cli import main
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)
"""


def peak(folder: Path, rows: int) -> float:
    """MiB of the driver's resident memory at its highest, over `rows` comments; one in a hundred is malformed."""
    lines = (json.dumps({"id": i, "body": f"comment {i} on something"}) if i % 100 else "{broken" for i in range(rows))
    (folder / f"{rows}.jsonl").write_text("\n".join(lines) + "\n")
    named = {"task": "task.yaml", "teacher": "teacher", "comments": f"{rows}.jsonl", "out": f"out-{rows}"}
    arguments = [f"--{name}={folder / value}" for name, value in named.items()]
    settings = ["--set=teacher.engine=transformers", "--set=extract.calibration_floor=0", "--set=extract.rows_per_unit=256"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "extract", *arguments, *settings],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RETORT_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(next(line for line in done.stderr.splitlines() if line.startswith("peak ")).split()[1])


@click.command()
@click.option("--rows", multiple=True, default=(4_000, 40_000), show_default=True)
def main(rows: tuple[int, ...]) -> None:
    """Extracts each number of comments and prints the driver's peak memory."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import save_teacher

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", seed=0)
        (folder / "task.yaml").write_text(TASK)
        peaks = {count: peak(folder, count) for count in rows}
    table = Table("comments", "driver's peak, MiB", "× the first", box=None)
    for count, value in peaks.items():
        table.add_row(f"{count:,}", f"{value:.0f}", f"{value / peaks[rows[0]]:.2f}")
    Console().print(table)
    keep("memory", {"peak_mib": peaks})


if __name__ == "__main__":
    main()
