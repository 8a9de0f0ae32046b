"""A Ray cluster on this machine, each of its machines a `ray start` of its own, behind a token, as people start one by hand."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil

RAY = Path(sys.executable).parent / "ray"
HERE = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind((HERE, 0))
        return int(listening.getsockname()[1])


class RayCluster:
    """A head that offers two CPUs, and whatever machines are added to it."""

    def __init__(self, **environment: str) -> None:
        self.port, self.dashboard = free_port(), free_port()
        self._own = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RETORT_", "PYTHONPATH"))
        }
        self._own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | environment
        self._own["PATH"] = f"{RAY.parent}{os.pathsep}{self._own['PATH']}"  # a job's `python` is the first on the head's PATH
        self.machines: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> RayCluster:
        self._scratch = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # paths of sockets are short
        ports = {"port": self.port, "dashboard-port": self.dashboard, "ray-client-server-port": free_port()}
        self.add("--head", *(f"--{name}={port}" for name, port in ports.items()), cpus=2)
        while self.ray("job", "list").returncode:
            assert self.machines[0].poll() is None, "the head did not start"
            time.sleep(0.5)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for machine in reversed(self.machines):
            self.kill(machine)
        self._scratch.cleanup()

    def add(self, *options: str, cpus: int = 1, resources: str = "{}") -> subprocess.Popen[bytes]:
        """One more machine."""
        agents = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        ports = [f"--{name}-port={free_port()}" for name in agents]  # by default the same on every machine
        where = options or [f"--address={HERE}:{self.port}"]
        what = [f"--num-cpus={cpus}", f"--resources={resources}", "--disable-usage-stats", f"--node-ip-address={HERE}"]
        disk = Path(self._scratch.name) / str(len(self.machines))  # each has its own copy of a job's code
        command = [RAY, "start", "--block", *where, *ports, *what, f"--temp-dir={disk}"]
        with (log := disk.with_suffix(".log")).open("wb") as stream:
            machine = subprocess.Popen(command, env=self._own, stdout=stream, stderr=stream)
        self.machines.append(machine)
        while "Ray runtime started" not in log.read_text():
            assert machine.poll() is None, log.read_text()
            time.sleep(0.1)
        return machine

    def kill(self, machine: subprocess.Popen[bytes]) -> None:
        """All its processes at once, as when a machine loses its power."""
        if machine.poll() is None:
            for process in [*psutil.Process(machine.pid).children(recursive=True), machine]:
                process.kill()
            machine.wait()

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of Ray's own."""
        return subprocess.run([RAY, *arguments], env=self.environment, capture_output=True, text=True, check=False)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a command finds its way to the cluster."""
        where = {"RAY_ADDRESS": f"{HERE}:{self.port}", "RAY_API_SERVER_ADDRESS": f"http://{HERE}:{self.dashboard}"}
        return where | {name: self._own[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
