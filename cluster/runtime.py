"""Ray, started on this machine or joined where RAY_ADDRESS says, with what every worker needs in its environment."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import ray

from cluster.version import VARIABLE, code_version

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


def start_ray() -> None:
    """Joins the cluster of this job or of RAY_ADDRESS; without one, starts Ray on this machine. Once per process."""
    if ray.is_initialized():
        return
    for name, value in RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "local"),  # not whatever cluster happens to run on this machine
        runtime_env={"env_vars": _worker_environment()},
        logging_level=logging.ERROR,
        log_to_driver=log.isEnabledFor(logging.DEBUG),  # engines are talkative; what fails reaches the driver anyway
    )

    for name in ("ray.data", "ray.train", "ray.tune"):  # Ray sets its own levels when it starts
        logging.getLogger(name).setLevel(logging.DEBUG if log.isEnabledFor(logging.DEBUG) else logging.ERROR)


def _worker_environment() -> dict[str, str]:
    """Variables of every worker process: the driver's code version, and where its packages are when not installed."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {VARIABLE: code_version(), "PYTHONPATH": path} | RAY_TRAIN
