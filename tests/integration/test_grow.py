"""The whole loop of `retort grow` against a real API, killed wherever it happens to be."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.shards.manifest import open_shards
from student.data.unpack import TRAIN, split_of
from tests.integration.conftest import Retort
from tests.integration.test_api import TASK, Server, serve  # noqa: F401 - a fixture
from tests.tiny import ROOT

TEXTS = 900
SMALL = [
    "student.layers=1",
    "student.width=32",
    "student.heads=2",
    "student.mlp=64",
    "train.epochs=1",
    "train.learning_rate=1e-5",
]
ROUNDS = ["grow.first=200", "grow.coverage=1", "extract.rows_per_unit=64", "teacher.engine=openai"]


def arguments(folder: Path, server: Server, calls: int) -> list[str]:
    (folder / "task.yaml").write_text(TASK)
    texts = [f"{random.Random(i).choice(['bad', 'fine', 'so so'])} thing {i}" for i in range(TEXTS)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    named = {"task": folder / "task.yaml", "comments": folder / "texts.jsonl", "teacher": "m", "out": folder / "out"}
    settings = [*SMALL, *ROUNDS, f"teacher.url={server.url}", "teacher.requests=8"]
    return [*(f"--{name}={value}" for name, value in named.items()), f"--calls={calls}", *(f"--set={s}" for s in settings)]


def grown(tmp_path: Path, retort: Retort, server: Server, kills: int, sizes: list[int]) -> set[str]:
    """Of a loop that was killed so often, all texts that were asked about, each once."""
    rng = random.Random(5)
    command = [sys.executable, "-m", "pipeline.cli", "grow", *arguments(tmp_path, server, sizes[-1])]
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, env=retort.environment(), stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(5, 25))
        process.send_signal(signal.SIGKILL)
        process.wait()
    output = retort("grow", *arguments(tmp_path, server, sizes[-1]))
    out = tmp_path / "out"
    asked = [
        json.loads(line)["body"] for path in sorted(out.glob("rounds/*/texts.jsonl")) for line in path.read_text().splitlines()
    ]
    assert len(asked) == len(set(asked)) == sizes[-1]
    assert set(server.paid) == set(asked)
    assert sum(server.paid.values()) <= sizes[-1] + 8 * kills  # what was in flight at a kill is asked again
    assert f"after {sizes[-1]:,} calls" in output
    done = [json.loads(path.read_text()) for path in sorted(out.glob("rounds/*/round.json"))]
    assert [row["calls"] for row in done] == sizes
    assert open_shards(str(out / "shards")).manifest.rows == sizes[-1]
    splits = Counter(split_of(text) == TRAIN for text in asked)
    assert splits[True] == pytest.approx(0.8 * sizes[-1], abs=1)
    assert json.loads((out / "report/fidelity.json").read_text())["examples"]["train"] == splits[True]
    assert "data:image/svg+xml" in (out / "grow.html").read_text()
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "retort"]
    runs = client.search_runs([experiment.experiment_id])
    (growth,) = [run for run in runs if run.data.tags.get("retort.kind") == "growth"]
    children = {run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == growth.info.run_id}
    assert children == {f"{row['calls']:,} calls" for row in done}
    return set(asked)


def test_a_loop_asks_about_the_texts_it_chooses_once(tmp_path: Path, retort: Retort, serve: Any) -> None:  # noqa: F811
    grown(tmp_path, retort, serve(), 0, [200, 280])


@pytest.mark.slow
def test_a_loop_killed_often_goes_on_with_more_calls(tmp_path: Path, retort: Retort, serve: Any) -> None:  # noqa: F811
    server, out, sizes = serve(), tmp_path / "out", [200, 301, 452, 500]
    asked = grown(tmp_path, retort, server, 6, sizes)
    more_calls = sizes[-1] + 20
    assert f"after {more_calls:,} calls" in retort("grow", *arguments(tmp_path, server, more_calls))
    assert open_shards(str(out / "shards")).manifest.rows == more_calls
    asked |= {json.loads(line)["body"] for line in (out / f"rounds/{len(sizes):02d}/texts.jsonl").read_text().splitlines()}
    folders = [f"--student={out / 'student'}", f"--shards={out / 'shards'}", f"--out={tmp_path / 'next'}"]
    retort.here("select", *folders, f"--comments={tmp_path / 'texts.jsonl'}", "--budget=50")
    more = [json.loads(line)["body"] for line in (tmp_path / "next/select/texts.jsonl").read_text().splitlines()]
    assert len(set(more) - asked) == len(more) == 50
