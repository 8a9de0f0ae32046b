"""Whether there is room for what is asked: better refused with the arithmetic than waited for without end."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from pipeline.base.errors import UserError

log = logging.getLogger(__name__)


def require_room(what: str, count: int, each: dict[str, float]) -> None:
    """Checks that so many workers can run at once. A cluster that is too small may grow, so it gets a warning instead.

    Args:
        each: the amount of each resource, by Ray's names, that one of them takes.

    Raises:
        UserError: this machine alone will never have the room.
    """
    room = ray.cluster_resources()
    for name, amount in each.items():
        if count * amount > room.get(name, 0.0):
            arithmetic = f"{what} takes {count} × {amount:g} = {count * amount:g} {name}, and there are {room.get(name, 0.0):g}"
            if not os.environ.get("RAY_ADDRESS"):
                raise UserError(f"{arithmetic}: ask for fewer or smaller workers, or run on a cluster (RAY_ADDRESS)")
            log.warning("%s: waiting for the cluster to grow", arithmetic)


def ray_options(resources: dict[str, float]) -> dict[str, Any]:
    """A worker's resources, by Ray's names, as options of a Ray task or actor."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources["CPU"], "num_gpus": resources["GPU"], "resources": custom}
