"""How near `retort plan` comes to a real run on the machine that `retort scale` measured, in seconds of whole commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from cluster.config import ClusterSettings
from cluster.plan.estimate import make_plan
from pipeline.cli.settings import load_config


@click.command()
@click.option("--scale", required=True, metavar="JSON", help="scale.json of this machine, measured with the same settings.")
@click.option("--config", required=True, metavar="YAML", help="Of the run: task, teacher, comments, student.")
@click.option("--rows", default=3072, show_default=True, help="Comments to extract and train on.")
@click.option("--workers", default=2, show_default=True, help="Teacher actors and training workers.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of each, as measured.")
@click.option("--out", default="runs/plan", show_default=True, metavar="DIR", help="The run's folder; it must be new.")
def main(scale: str, config: str, rows: int, workers: int, threads: int, out: str) -> None:
    """Plans a small run, runs it, and prints both."""
    settings = [f"{stage}.threads={threads}" for stage in ("teacher", "train")]
    settings += [f"teacher.actors={workers}", f"train.workers={workers}", f"comments.limit={rows}"]
    predicted = predict(load_config(config, settings, {"plan.scale": scale, "plan.comments": rows, "plan.workers": workers}))
    options = [f"--config={config}", f"--out={out}", *(f"--set={one}" for one in settings)]
    measured = {stage: seconds(stage, options) for stage in ("extract", "train")}
    table = Table("stage", "planned, s", "measured, s", "planned / measured", box=None)
    for stage, took in measured.items():
        table.add_row(stage, f"{predicted[stage]:.1f}", f"{took:.1f}", f"{predicted[stage] / took:.2f}")
    Console().print(table)
    Path(out, "plan.json").write_text(json.dumps({"planned": predicted, "measured": measured}, indent=2))


def predict(config: ClusterSettings) -> dict[str, float]:
    """Seconds by stage."""
    return {stage.name: 3600 * stage.wall_hours for stage in make_plan(config).stages}


def seconds(stage: str, options: list[str]) -> float:
    """Of a stage's command, from its start to its end."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "pipeline.cli", stage, *options], check=True)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
