"""Typed configuration of the service."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from student.config import AnswerConfig, Threads


class ServeConfig(AnswerConfig):
    """How a student is served."""

    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0 is every one of this machine")
    hosts: tuple[Annotated[str, Field(pattern=r"^[\w.-]+$")], ...] = Field(
        (), description="names under which clients ask for it, beside localhost, the machine's own and `host`; without ports"
    )
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    batch: int = Field(64, ge=1, description="comments decoded together, when as many wait")
    queue: int = Field(4096, ge=1, description="comments that may wait; a request that would add more is refused")
    max_texts: int = Field(1024, ge=1, description="comments of one request")
    max_bytes: int = Field(4 << 20, ge=1, description="of a request's body")
    timeout_seconds: float = Field(30, gt=0, description="after which a request is given up")
    drain_seconds: float = Field(30, gt=0, description="that the requests in flight have when the service is asked to stop")
    threads: Threads | None = Field(None, description="CPU threads of the student; null takes the machine's")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_texts > self.queue:
            raise ValueError(f"a request of max_texts ({self.max_texts}) never fits in the queue ({self.queue})")
        return self
