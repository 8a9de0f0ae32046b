"""What stands before the application: who may ask, how much a request may hold, and what browsers may do with answers."""

from __future__ import annotations

import asyncio
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from student.serve.config import ServeConfig
from student.serve.errors import Refused

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]*)(:\d+)?")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses requests for other hosts and bodies that are too large or do not come.

    A page of another site can have its name resolve to 127.0.0.1 and so reach a service of this machine as its own
    site's; but the Host header then has that name.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app, self._config = app, config
        bare = config.host.strip("[]")
        names = {"localhost", "127.0.0.1", "[::1]", f"[{bare}]" if ":" in bare else bare}
        self._hosts = names if config.loopback else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        if refusal:
            return await refusal.response()(scope, receive, secured)
        return await self._app(scope, self._limited(receive), secured)

    def _refusal(self, headers: Headers) -> Refused | None:
        host = HOST.fullmatch(headers.get("host", "").lower())
        if self._hosts is not None and not (host and host[1] in self._hosts):
            return Refused(400, f"the Host header names none of {', '.join(sorted(self._hosts))}", "host")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._config.max_bytes:
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Gives the body up at the first byte too many, and when no more of it comes."""
        received, complete = 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout(self._config.timeout_seconds):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "the rest of the body did not come: send it without a pause", "timeout") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._config.max_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> Refused:
        most = f"{self._config.max_bytes:,} bytes"
        return Refused(413, f"the body is larger than {most}: send fewer texts at once (serve.max_bytes)", "too_large")
