"""What an API is paid for."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import TeacherConfig


@dataclass(frozen=True)
class Usage:
    """What was paid for."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def cost(self, config: TeacherConfig) -> float | None:
        """In the currency of the prices; None without them."""
        if config.input_price is None or config.output_price is None:
            return None
        return (self.input_tokens * config.input_price + self.output_tokens * config.output_price) / 1e6
