"""Whatever dies in the middle of an extraction, every row of the input ends in exactly one place."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from pipeline.shards.manifest import open_shards
from tests.conftest import RealCase
from tests.integration.conftest import Retort
from tests.tiny import ROOT, save_teacher

TASK = """
name: tiny
teacher: none
instruction: Judge.
fields: {mood: [good, bad, mixed], loud: {type: boolean}}
comments: {min_tokens: 2, max_tokens: 60}
context: 110
auxiliary_tokens: 20
"""
KILL_DRIVER, KILL_ACTOR, KILL_ENGINE, KILL_NODE = "driver", "actor", "engine", "node"


@dataclass
class Chaos:
    """A two-node cluster, a command that extracts on it, and what kills parts of them."""

    folder: Path
    arguments: list[str]
    cluster: Cluster = field(init=False)
    nodes: list[Any] = field(init=False)
    pause: float = 2.0  # the longest wait between a commit and the next kill
    driver: subprocess.Popen[bytes] | None = None
    struck: list[tuple[str, bool, int]] = field(default_factory=list)  # victim, whether it was there, shards committed then
    kept: dict[str, int] = field(default_factory=dict)  # shards committed before a kill

    def __enter__(self) -> Chaos:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1)]
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_driver()
        self.cluster.shutdown()

    def start(self) -> None:
        environment = Retort(self.folder).environment() | {"RAY_ADDRESS": self.cluster.address}
        command = [sys.executable, "-m", "pipeline.cli", "extract", *self.arguments, f"--out={self.folder / 'out'}"]
        with (self.folder / "log.txt").open("ab") as log:
            self.driver = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None

    def kill_driver(self) -> bool:
        if self.driver is None:
            return False
        self.driver.kill()
        self.driver.wait()
        return True

    def kill_actor(self) -> bool:
        return kill(lambda command: command.startswith("ray::") and "UnitExtractor" in command)

    def kill_engine(self) -> bool:
        return kill(lambda command: "pipeline.teacher.process" in command)

    def kill_node(self) -> bool:
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))
        return True

    def strike(self, victim: str) -> bool:
        strikes = {KILL_DRIVER: self.kill_driver, KILL_ACTOR: self.kill_actor, KILL_ENGINE: self.kill_engine}
        return (strikes | {KILL_NODE: self.kill_node})[victim]()

    def committed(self) -> dict[str, int]:
        """Shards that exist, and when they were written."""
        return {path.name: path.stat().st_mtime_ns for path in (self.folder / "out/shards").glob("shard-*.parquet")}

    def wait_for(self, ready: Callable[[], bool], seconds: float = 240) -> None:
        until = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < until, (self.folder / "log.txt").read_text()[-5000:]
            time.sleep(0.05)


def kill(matches: Callable[[str], bool]) -> bool:
    """Kills one process of this cluster whose command line matches, as `kill -9` does; other tests have theirs."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if matches(" ".join(process.cmdline())):
                process.kill()
                return True
    return False


def survive(chaos: Chaos, victims: list[str], rng: random.Random) -> None:
    """Runs the command to its end, killing one victim after another at random moments of the extraction itself."""
    for victim in victims:
        if not chaos.running():
            chaos.start()
        before = len(chaos.committed())
        chaos.wait_for(lambda before=before: len(chaos.committed()) > before or not chaos.running())
        time.sleep(rng.random() * chaos.pause)
        kept = chaos.committed()
        chaos.struck.append((victim, chaos.strike(victim), len(kept)))
        chaos.kept |= kept
    for _ in range(3):  # a run may end with an error of Ray's when its node dies; the same command goes on
        if not chaos.running():
            chaos.start()
        chaos.wait_for(lambda: not chaos.running(), 600)
        if chaos.driver and chaos.driver.returncode == 0:
            final = chaos.committed()
            assert all(final[name] == written for name, written in chaos.kept.items()), "a committed shard was written again"
            return
    raise AssertionError((chaos.folder / "log.txt").read_text()[-5000:])


def assert_exactly_once(out: Path, rows: int) -> None:
    """Every row of the one input file is an example, set aside by the extraction or by the plan, or dropped by a filter."""
    shards = open_shards(str(out / "shards"))
    examples = [int(key[1]) for table in shards.tables() for key in table.keys]
    aside = [json.loads(line)["line"] - 1 for line in (out / "shards/set_aside.jsonl").read_text().splitlines()]
    malformed = [json.loads(line)["line"] - 1 for line in (out / "comments/set_aside.jsonl").read_text().splitlines()]
    found = examples + aside + malformed
    assert len(found) == len(set(found)), "a row is there twice"
    plan: Any = shards.manifest.comments
    assert len(found) + sum(plan.dropped.values()) == plan.read == rows
    assert len(examples) + len(aside) == plan.kept
    assert not list((out / "shards").glob(".writing-*"))


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Arguments for 900 comments with doubled and missing ids, and malformed rows among them."""
    save_teacher(tmp_path / "teacher", seed=0)
    (tmp_path / "task.yaml").write_text(TASK)
    lines = [json.dumps({"id": i % 7 or None, "body": f"comment {i % 50} good and bad"}) for i in range(900)]
    lines[3], lines[100], lines[200] = "{broken", json.dumps({"body": 5}), json.dumps({"body": "x"})
    (tmp_path / "comments.jsonl").write_text("\n".join(lines) + "\n")
    named = {"task": "task.yaml", "teacher": "teacher", "comments": "comments.jsonl"}
    settings = ["teacher.engine=transformers", "teacher.actors=2", "extract.rows_per_unit=5", "extract.calibration_floor=0"]
    return [f"--{name}={tmp_path / value}" for name, value in named.items()] + [f"--set={setting}" for setting in settings]


@pytest.fixture
def tiny_chaos(tmp_path: Path, tiny: list[str]) -> Iterator[Chaos]:
    with Chaos(tmp_path, tiny, pause=0.5) as chaos:
        yield chaos


@pytest.mark.slow
def test_a_killed_engine_node_and_driver_lose_nothing(tiny_chaos: Chaos) -> None:
    survive(tiny_chaos, [KILL_ENGINE, KILL_NODE, KILL_DRIVER], random.Random(0))
    assert_exactly_once(tiny_chaos.folder / "out", 900)
    assert all(there and shards < 180 for _, there, shards in tiny_chaos.struck), tiny_chaos.struck


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_lose_nothing(tmp_path: Path, real_case: RealCase) -> None:
    rng, victims = random.Random(2026), [KILL_ACTOR, KILL_ENGINE, KILL_NODE, KILL_DRIVER] * 5
    rng.shuffle(victims)
    source = real_case.comments
    named = {"task": real_case.task, "teacher": real_case.teacher, "comments": source}
    settings = ["teacher.actors=2", "extract.rows_per_unit=64", "comments.limit=2560"]
    arguments = [f"--{name}={value}" for name, value in named.items()] + [f"--set={setting}" for setting in settings]
    for run in range(4):
        folder = tmp_path / str(run)
        folder.mkdir()
        with Chaos(folder, arguments) as chaos:
            survive(chaos, victims[run * 5 : run * 5 + 5], rng)
            assert sum(there for _, there, _ in chaos.struck) >= 4, chaos.struck
        with gzip.open(source, "rt") as lines:
            read = open_shards(str(folder / "out/shards")).manifest.comments.model_dump()["read"]
            assert sum(1 for _ in lines) >= read
        assert_exactly_once(folder / "out", read)
