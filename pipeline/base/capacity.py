"""Whether there is room for what is asked: better refused with the arithmetic than waited for without end."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from pipeline.base.errors import UserError

log = logging.getLogger(__name__)


def require_room(what: str, count: int, each: dict[str, float], beside: dict[str, float] | None = None) -> None:
    """Checks that so many workers can run at once. A cluster that is too small may grow, so it gets a warning instead.

    Args:
        each: the amount of each resource, by Ray's names, that one of them takes.
        beside: what runs beside them takes, all together.

    Raises:
        UserError: this machine alone will never have the room.
    """
    room, beside = ray.cluster_resources(), beside or {}
    for name in each | beside:
        amount, others = each.get(name, 0.0), beside.get(name, 0.0)
        total = count * amount + others
        if total > room.get(name, 0.0):
            parts = f"{count} × {amount:g}" + (f" + {others:g} beside" if others else "")
            arithmetic = f"{what} takes {parts} = {total:g} {name}, and there are {room.get(name, 0.0):g}"
            if not os.environ.get("RAY_ADDRESS"):
                raise UserError(f"{arithmetic}: ask for fewer or smaller workers, or run on a cluster (RAY_ADDRESS)")
            log.warning("%s: waiting for the cluster to grow", arithmetic)


def fitting(each: dict[str, float], beside: dict[str, float]) -> int:
    """How many workers there is room for, each on one machine, one at least; arguments as of `require_room`."""
    needs, room = {name: amount for name, amount in each.items() if amount}, ray.cluster_resources()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = sum(min(int(machine.get(name, 0.0) / amount) for name, amount in needs.items()) for machine in machines)
    return max(1, min(there, *(int((room.get(name, 0.0) - beside.get(name, 0.0)) / needs[name]) for name in needs)))


def ray_options(resources: dict[str, float]) -> dict[str, Any]:
    """A worker's resources, by Ray's names, as options of a Ray task or actor."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources["CPU"], "num_gpus": resources["GPU"], "resources": custom}
