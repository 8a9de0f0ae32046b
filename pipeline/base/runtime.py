"""Ray, started on this machine or joined where RAY_ADDRESS says, with what every worker needs in its environment."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import services

from pipeline.base.console import console
from pipeline.base.signals import cause
from pipeline.base.version import VARIABLE, code_version

log = logging.getLogger(__name__)

# glibc gives large blocks back to the kernel at once and faults them in again; on CPU that made training five times slower.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
RAY_TRAIN = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how often workers may report; 2 seconds otherwise
}
# Ray hides GPUs from who reserved none only if asked to: each of a machine's CPU workers would take the first one.
RAY_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
# Ray warns of four times as many workers as it would start at once, by default one a CPU. A training in a search has nine,
# of which eight wait, and there is a training a CPU.
RAY_HEAD = {"RAY_worker_maximum_startup_concurrency": str(4 * (os.cpu_count() or 1))}


def start_ray() -> None:
    """Joins the cluster of this job or of RAY_ADDRESS; without one, starts Ray on this machine. Once per process.

    From then on SIGTERM raises KeyboardInterrupt in the main thread, as Ctrl-C does.
    """
    if ray.is_initialized():
        return
    for name, value in (RAY_TRAIN | RAY_HEAD).items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS", "local")  # not whatever cluster happens to run on this machine
    worker = ray._private.worker
    worker.print_to_stdstream = partial(_without_its_end, worker.print_to_stdstream)
    with _own_process_groups():
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,  # eleven processes and 1 GB that nobody looks at
            runtime_env={"env_vars": _worker_environment()},
            logging_level=logging.ERROR,
            log_to_driver=log.isEnabledFor(logging.DEBUG),  # engines are talkative; what fails reaches the driver anyway
        )
    for started in worker._global_node.all_processes.get("raylet", []):  # none where a cluster is joined
        threading.Thread(target=_watch, args=[started.process], daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own handler prints C++ frames and aborts
    for name in ("ray.data", "ray.train", "ray.tune"):  # Ray sets its own levels when it starts
        logging.getLogger(name).setLevel(logging.DEBUG if log.isEnabledFor(logging.DEBUG) else logging.ERROR)


def _watch(raylet: subprocess.Popen[bytes]) -> None:
    """Ends this process when Ray's ends: Ray would say so in seventy lines, half a minute later."""
    code = raylet.wait()
    if ray.is_initialized():  # else it is Ray's own end
        console.show_cursor()
        console.print(
            f"[red]error:[/red] Ray's own process on this machine ended ({cause(code)}), and with it all that ran here. "
            "What was committed is kept: run the same command again to go on",
            soft_wrap=True,
        )
        with suppress(ProcessLookupError):  # its agents, which would wait for Ray's other processes
            os.killpg(raylet.pid, signal.SIGKILL)
        os._exit(1)


def _without_its_end(tell: Callable[..., None], data: dict[str, Any], ignore_prefix: bool) -> None:
    """What Ray tells, but for the log of a raylet that is gone, which `_watch` has a line for."""
    if not data["lines"][0].startswith("Raylet is terminated"):
        tell(data, ignore_prefix)


@contextmanager
def _own_process_groups() -> Iterator[None]:
    """Within, Ray starts its processes in process groups of their own.

    `timeout` and some schedulers send SIGTERM to the whole group of a command, which is to finish what is in flight. Ray keeps
    only SIGINT from its processes, so its head would be gone before. Without Linux's way to let children die with
    their parent it needs them in the driver's group.
    """
    popen = services.ConsolePopen
    if sys.platform == "linux":
        services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _worker_environment() -> dict[str, str]:
    """Variables of every worker process: the driver's code version, where its packages are when not installed, how
    its threads wait for each other, and that it sees no GPU but its own.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    waiting = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    return {VARIABLE: code_version(), "PYTHONPATH": path} | waiting | RAY_TRAIN | RAY_GPUS
