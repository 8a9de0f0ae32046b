"""Long work on the event loop in turns, so that no request waits for more than one piece of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

TURN = 0.005  # seconds of the event loop that are taken at once
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))  # as of starlette's JSONResponse


class Turns:
    """Of all that have long work, one at a time has the event loop, and everyone else has it in between."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Returns when it is the caller's turn; the turn lasts until the caller next waits for something."""
        async with self._lock:
            await asyncio.sleep(0)

    async def encode(self, start: str, items: Iterable[Any], end: str) -> list[bytes]:
        """A list in JSON between two texts, in pieces of a turn each. The first turn needs no waiting."""
        pieces: list[bytes] = []
        parts, comma, since = [start], "", time.perf_counter()
        for item in items:
            parts += (comma, ENCODER.encode(item))
            comma = ","
            if time.perf_counter() - since > TURN:
                pieces.append("".join(parts).encode())
                parts.clear()
                await self.take()
                since = time.perf_counter()
        return [*pieces, "".join([*parts, end]).encode()]


class Pieces(Response):
    """A response that is sent piece by piece, as the client takes it."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__(headers={"Content-Length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for left, piece in zip(reversed(range(len(self._pieces))), self._pieces, strict=True):
            await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
