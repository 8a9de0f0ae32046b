"""What kills parts of an extraction at random, and looks whether every row is there once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs
from ray.cluster_utils import Cluster

from pipeline.base import storage
from pipeline.shards.manifest import open_shards
from tests.integration.conftest import Retort
from tests.tiny import ROOT

KILL_DRIVER, KILL_ACTOR, KILL_ENGINE, KILL_NODE = VICTIMS = "driver", "actor", "engine", "node"
PROCESSES: dict[str, Callable[[str], bool]] = {  # by their command lines
    KILL_ACTOR: lambda command: command.startswith("ray::") and "Extractor)" in command,
    KILL_ENGINE: lambda command: "pipeline.teacher.process" in command or "benchmarks.stand_in" in command,
}


@dataclass
class Chaos:
    """A two-node cluster, a command that extracts on it, and what kills parts of them.

    Attributes:
        folder: of the log, and of the command's cache.
        arguments: of the command.
        program: what runs it.
        fs: where `out` is, by a way that does not fail.
        out: the command's, within `fs`; a folder of `folder` by default.
        environment: variables of the command.
        patience: the share of kills before which a new shard is waited for; else that the victim is there.
        pause: the longest wait before a kill, in seconds.
        look_every: seconds between two looks at the shards.
        settled: seconds after which a shard is not written again, even if a request to write it came late.
        struck: victims, whether they were there, and how many shards were committed then.
        kept: shards that were committed before a kill, and when.
    """

    folder: Path
    arguments: list[str]
    program: list[str] = field(default_factory=lambda: [sys.executable, "-m", "pipeline.cli", "extract"])
    fs: pafs.FileSystem = field(default_factory=pafs.LocalFileSystem)
    out: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    patience: float = 1.0
    pause: float = 2.0
    look_every: float = 0.05
    settled: float = 0.0
    struck: list[tuple[str, bool, int]] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    cluster: Cluster = field(init=False)
    nodes: list[Any] = field(init=False)
    driver: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Chaos:
        self.out = self.out or str(self.folder / "out")
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1)]
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_driver()
        self.cluster.shutdown()

    def start(self) -> None:
        environment = Retort(self.folder).environment() | {"RAY_ADDRESS": self.cluster.address} | self.environment
        with (self.folder / "log.txt").open("ab") as log:
            self.driver = subprocess.Popen([*self.program, *self.arguments], env=environment, cwd=ROOT, stdout=log, stderr=log)

    def running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None

    def kill_driver(self) -> bool:
        there = self.running()
        if self.driver:
            self.driver.kill()
            self.driver.wait()
        return there

    def kill_node(self) -> bool:
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))
        return True

    def strike(self, victim: str) -> bool:
        if victim in PROCESSES:
            with suppress(IndexError, psutil.NoSuchProcess):
                found(victim)[0].kill()
                return True
            return False
        return self.kill_node() if victim == KILL_NODE else self.kill_driver()

    def there(self, victim: str) -> bool:
        return bool(found(victim)) if victim in PROCESSES else self.running()

    def committed(self) -> dict[str, int]:
        """Shards that exist, and when they were written."""
        selector = pafs.FileSelector(f"{self.out}/shards", allow_not_found=True)
        files = {info.base_name: info.mtime_ns for info in self.fs.get_file_info(selector)}
        return {name: written for name, written in files.items() if name.startswith("shard-") and name.endswith(".parquet")}

    def wait_for(self, ready: Callable[[], bool], seconds: float = 240) -> None:
        until = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < until, self.log()
            time.sleep(self.look_every)

    def log(self) -> str:
        """The end of what the command said."""
        return (self.folder / "log.txt").read_text()[-5000:]


def found(victim: str) -> list[psutil.Process]:
    """Processes of this cluster that are such victims; other tests have theirs."""
    those = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if PROCESSES[victim](" ".join(process.cmdline())):
                those.append(process)
    return those


def survive(chaos: Chaos, victims: list[str], rng: random.Random) -> None:
    """Runs the command to its end, killing one victim after another at random moments."""
    for victim in victims:
        if not chaos.running():
            chaos.start()
        if rng.random() < chaos.patience:
            before = len(chaos.committed())
            chaos.wait_for(lambda before=before: not chaos.running() or len(chaos.committed()) > before)
        else:
            chaos.wait_for(lambda victim=victim: not chaos.running() or chaos.there(victim))
        time.sleep(rng.random() * chaos.pause)
        there = chaos.committed()
        chaos.struck.append((victim, chaos.strike(victim), len(there)))
        chaos.kept |= {name: written for name, written in there.items() if written < time.time_ns() - 1e9 * chaos.settled}
    for _ in range(3):  # a run may end with an error of Ray's when its node dies; the same command goes on
        if not chaos.running():
            chaos.start()
        chaos.wait_for(lambda: not chaos.running(), 600)
        if chaos.driver and chaos.driver.returncode == 0:
            final = chaos.committed()
            assert all(final[name] == written for name, written in chaos.kept.items()), "a committed shard was written again"
            return
    raise AssertionError(chaos.log())


def rows_once(out: str) -> dict[str, int]:
    """Of the one input file: its rows, those that are nowhere, and those that are in two places.

    A row is an example, set aside by the extraction or by the plan, or dropped by a filter.
    """
    shards = open_shards(f"{out}/shards")
    lines = [storage.read_text(f"{out}/{part}/set_aside.jsonl").splitlines() for part in ("shards", "comments")]
    aside, malformed = ([json.loads(line)["line"] - 1 for line in part] for part in lines)
    examples = [int(key[1]) for table in shards.tables() for key in table.keys]
    found, plan = examples + aside + malformed, shards.manifest.comments.model_dump()
    assert len(examples) + len(aside) <= plan["kept"]
    lost = plan["read"] - len(set(found)) - sum(plan["dropped"].values())
    return {"rows": plan["read"], "lost": lost, "doubled": len(found) - len(set(found))}


def assert_exactly_once(out: str, rows: int) -> None:
    """Every row is in one place, and nothing half written is left."""
    assert rows_once(out) == {"rows": rows, "lost": 0, "doubled": 0}
    assert not [name for name in storage.list_files(f"{out}/shards") if name.startswith(storage.UNFINISHED)]
