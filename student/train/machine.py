"""How busy the machine of a training is, under the names that MLflow's page of system metrics looks for."""

from __future__ import annotations

import time

import psutil
import torch

EVERY = 10.0  # seconds between two looks


class Machine:
    """Looks at this process's machine once in a while."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        psutil.cpu_percent()  # each look is at the time since the one before

    def measures(self) -> dict[str, float]:
        """Utilization of CPUs and memory, and the memory of this worker's GPU; nothing where the last look is not long ago."""
        if time.monotonic() - self._looked < EVERY:
            return {}
        self._looked, memory = time.monotonic(), psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
        }
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            found["gpu_0_memory_usage_megabytes"] = (total - free) / 1e6
            found["gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
        return {f"system/{name}": float(value) for name, value in found.items()}
