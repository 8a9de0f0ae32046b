"""What a run has paid an API, and whether it may make another call."""

from __future__ import annotations

import asyncio

from pipeline.config import TeacherConfig
from pipeline.teacher.usage import Usage

LOOK_EVERY = 0.05  # seconds, where a call has to wait for what others will have cost


class Spending:
    """The sums of a run, of which calls in flight are reserved as what the dearest one cost.

    Args:
        spent: by earlier runs in the same folder.
        bound: what one call may take, until one has come back.
    """

    def __init__(self, config: TeacherConfig, spent: Usage, bound: Usage) -> None:
        self._config, self.spent = config, spent
        self._seen, self._in_flight = self.cost / max(1, spent.calls), 0
        self._dearest = self._seen or bound.cost(config) or 0.0

    async def reserve(self) -> bool:
        """Waits until a call can be afforded; false where none will be."""
        while not self._affordable():
            if not self._in_flight:
                return False
            await asyncio.sleep(LOOK_EVERY)
        self._in_flight += 1
        return True

    def _affordable(self) -> bool:
        c, begun = self._config, self._in_flight + 1
        calls = c.max_calls is None or self.spent.calls + begun <= c.max_calls
        return calls and (c.max_cost is None or self.cost + begun * self._dearest <= c.max_cost)

    def settle(self, paid: Usage) -> None:
        """A reserved call has come back."""
        self._in_flight -= 1
        self.spent += paid
        if paid.calls:
            self._dearest = self._seen = max(self._seen, paid.cost(self._config) or 0.0)

    @property
    def cost(self) -> float:
        """So far, in the currency of the prices; 0 without them."""
        return self.spent.cost(self._config) or 0.0

    def __str__(self) -> str:
        """For people."""
        money = "" if self.spent.cost(self._config) is None else f", {self.cost:,.{2 if self.cost >= 1 else 4}f} spent"
        return f"{self.spent.calls:,} calls, {self.spent.input_tokens + self.spent.output_tokens:,} tokens{money}"
