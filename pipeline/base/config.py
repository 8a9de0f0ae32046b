"""What every part of the configuration is made of: strict models, and words for what is wrong with a file's content."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.base.errors import clip

MAX_FINDINGS = 10  # named in one message


class Strict(BaseModel):
    """An unknown key is an error, numbers are finite and integers have 64 bits at most, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _in_64_bits(cls, value: Any) -> Any:
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, int) and abs(item) > sys.maxsize:
                raise ValueError("an integer must fit in 64 bits")
        return value


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy, PyTorch and Optuna all take
Threads = Annotated[int, Field(ge=1, le=1024)]  # PyTorch crashes when it is to start 100,000


PRESENCE = 0.001  # of a machine's custom resource: a worker takes so little because any number may run there


def presence(machines: str | None) -> dict[str, float]:
    """What puts a worker on machines that offer a custom Ray resource, such as `teacher` in cluster/aws.yaml."""
    return {machines: PRESENCE} if machines else {}


def describe(error: ValidationError) -> str:
    """Pydantic's first findings, one a line, each naming its key."""
    findings, lines = error.errors(), []
    for finding in findings[:MAX_FINDINGS]:
        where = clip(".".join(str(part) for part in finding["loc"])) or "file"
        what = "unknown key" if finding["type"] == "extra_forbidden" else finding["msg"].removeprefix("Value error, ")
        lines.append(f"  {where}: {clip(what, 400)}")
    more = len(findings) - len(lines)
    return "\n".join(lines + [f"  and {more:,} more"] * (more > 0))
