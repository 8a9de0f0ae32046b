"""An API asked again and again: attempts, the budget, and when to give up."""

from __future__ import annotations

from typing import Any

import openai

from pipeline.base.errors import UserError, clip
from pipeline.teacher.endpoint import Endpoint, Reply
from pipeline.teacher.spending import Spending
from pipeline.teacher.usage import Usage

ATTEMPTS = 2  # at an answer that is none of the task's, or that does not come
IN_A_ROW = 10  # answers that fail one after another end the run


class Asker:
    """The calls of one run.

    Attributes:
        ended: why no further call is made.
        failure: what the user has to mend, where that is why.
    """

    def __init__(self, endpoint: Endpoint, spending: Spending) -> None:
        self._endpoint, self.spending = endpoint, spending
        self.ended = self.failure = ""
        self._in_a_row = 0

    async def record(self, text: str, sample: int = 0, paid: Usage | None = None) -> dict[str, Any]:
        """What became of one text after `ATTEMPTS`, or fewer where the run ends: `values`, `shares`, `reason`, `spent`.

        Args:
            sample: its number among several of the text.
            paid: for its attempts in earlier runs.
        """
        reason, paid = "it was not asked again", paid or Usage()
        for attempt in range(paid.calls, ATTEMPTS):
            if self.ended or not await self.spending.reserve():
                self.ended = (
                    self.ended
                    or f"the budget allows no further call ({self.spending}): give more, by --max-calls or --max-cost"
                )
                break
            reply = await self._call(text, seed=sample * ATTEMPTS + attempt)
            paid, reason = paid + reply.usage, reply.reason
            if reply.values is not None:
                self._in_a_row = 0
                return {"values": reply.values, "shares": reply.shares, "reason": None, "spent": vars(paid)}
        self._in_a_row += not self.ended
        if self._in_a_row >= IN_A_ROW:
            self.failure = self.ended = f"{IN_A_ROW} answers in a row failed; the last one: {reason}"
        return {"values": None, "shares": None, "reason": reason, "spent": vars(paid)}

    async def _call(self, text: str, seed: int) -> Reply:
        """One call that was reserved. Where no other would do better, the run is to end."""
        paid = Usage()
        try:
            reply = await self._endpoint.ask(text, seed)
            paid = reply.usage
            return reply
        except (openai.APIError, ValueError) as error:
            return Reply(None, None, f"the call failed: {clip(str(error) or type(error).__name__, 300)}", paid)
        except UserError as error:
            self.failure = self.ended = str(error)
            return Reply(None, None, str(error), paid)
        finally:
            self.spending.settle(paid)


def may_try_again(record: dict[str, Any]) -> bool:
    """Whether a run ended between two attempts at an answer."""
    return record["reason"] is not None and record["spent"]["calls"] < ATTEMPTS
