"""Kinds of machines: what they reach, and what an hour costs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.base.config import Strict, describe
from pipeline.base.errors import UserError
from pipeline.base.yaml_files import read_yaml

PRICES = Path(__file__).parent / "prices.yaml"
GPU_MACHINE, CPU_MACHINE = "p5.48xlarge", "cpu-2"  # in prices.yaml: what is planned for when nothing is said
GIB = 2**30


class Machine(Strict):
    """One kind; see prices.yaml for the units. A worker is a GPU, or a core of a machine without."""

    workers: int = Field(..., ge=1)
    tflops: float = Field(..., gt=0)
    bandwidth_gbyte_s: float = Field(..., gt=0)
    memory_gib: float = Field(..., gt=0)
    local_gbyte_s: float = Field(..., gt=0)
    network_gbit_s: float = Field(..., gt=0)
    dollars_per_hour: float = Field(..., ge=0)
    spot_dollars_per_hour: float | None = Field(None, ge=0)

    @property
    def flops_per_second(self) -> float:
        """Peak of one worker."""
        return self.tflops * 1e12

    @property
    def bytes_per_second(self) -> float:
        """Peak memory bandwidth of one worker."""
        return self.bandwidth_gbyte_s * 1e9

    @property
    def memory_bytes(self) -> float:
        """Of one worker."""
        return self.memory_gib * GIB

    def count(self, workers: int) -> int:
        """Machines that hold so many workers; a machine is paid for as a whole."""
        return -(-workers // self.workers)

    def dollars(self, workers: int, hours: float, spot: bool = False) -> float | None:
        """What so many workers cost for so many hours of wall time; None where there is no spot price."""
        price = self.spot_dollars_per_hour if spot else self.dollars_per_hour
        return None if price is None else self.count(workers) * hours * price


def read_machines(path: str | None) -> dict[str, Machine]:
    """The kinds of machines in a YAML file, by name; those of prices.yaml without one.

    Raises:
        UserError: it cannot be read, or a key is wrong.
    """
    try:
        return TypeAdapter(dict[str, Machine]).validate_python(read_yaml(path or str(PRICES)))
    except ValidationError as error:
        raise UserError(f"{path or PRICES}: the machines are wrong:\n{describe(error)}") from error


def machine_named(machines: dict[str, Machine], name: str) -> Machine:
    """One kind.

    Raises:
        UserError: there is none of that name.
    """
    if name not in machines:
        raise UserError(f"no machine {name!r} among the prices: choose one of {', '.join(machines)}, or add it (--prices)")
    return machines[name]
