"""What stands before the application: who may ask, how much a request may hold, and what browsers may do with answers."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import socket

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from student.config import ServeConfig
from student.serve.errors import Refused
from student.serve.turns import Turns

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(:\d+)?")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
OPEN = ("/", "/healthz")  # to callers without the key: a page that asks for it, and probes
MOST_HEADERS = 100
JSON_BYTES = 64 << 10  # of a body outside its strings: each may become an object, and they are parsed on the event loop
JSON_BYTES_OF_A_TEXT = 16  # besides: quotes, a comma and indentation
LARGE = 64 << 10  # bytes from which a body is parsed in turn


class Guard:
    """Refuses requests without the key, under other names than the service's, and bodies that are too large or do not come.

    A page of another site can have its name resolve to the service's address and so reach it as its own site's; but the
    Host header then has that name. An address in its place is nobody's name.

    Args:
        key: that callers must send, if there is one.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, turns: Turns, key: str | None = None) -> None:
        self._app, self._config, self._turns = app, config, turns
        self._key = f"Bearer {key}".encode() if key else None
        self._json_bytes = JSON_BYTES + JSON_BYTES_OF_A_TEXT * config.max_texts
        self._names = {name.lower() for name in ("localhost", config.host, socket.gethostname(), *config.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal:
            return await refusal.response()(scope, receive, secured)
        return await self._app(scope, self._limited(receive), secured)

    def _refusal(self, headers: Headers, path: str) -> Refused | None:
        if len(headers.raw) > MOST_HEADERS:
            return Refused(431, f"{len(headers.raw):,} headers: send at most {MOST_HEADERS}", "headers")
        if not self._is_here(headers.get("host", "").lower()):
            names = ", ".join(sorted(self._names))
            message = f"the Host header has neither an address nor one of {names}: list other names in serve.hosts"
            return Refused(400, message, "host")
        sent = headers.get("authorization", "").encode()
        if self._key and path not in OPEN and not hmac.compare_digest(sent, self._key):
            message = "send the service's key, as the header Authorization: Bearer KEY"
            return Refused(401, message, "key", {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._config.max_bytes:
            return self._too_large()
        return None

    def _is_here(self, host: str) -> bool:
        found = HOST.fullmatch(host)
        if not found:
            return False
        try:
            ipaddress.ip_address(found[1] or found[2])
        except ValueError:
            return found[2] in self._names
        return True

    def _limited(self, receive: Receive) -> Receive:
        """Gives the body up at the first byte too many, and when the time is up."""
        received, complete, outside = 0, False, OutsideStrings(self._json_bytes)
        deadline = asyncio.get_running_loop().time() + self._config.timeout_seconds

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "the rest of the body did not come: send it without a pause", "timeout") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._config.max_bytes:
                raise self._too_large()
            outside.read(message.get("body", b""))
            if complete and received > LARGE:
                await self._turns.take()
            return message

        return limited

    def _too_large(self) -> Refused:
        most = f"{self._config.max_bytes:,} bytes"
        return Refused(413, f"the body is larger than {most}: send fewer texts at once (serve.max_bytes)", "too_large")


class OutsideStrings:
    """Reads a body in pieces, and refuses more JSON around its strings than some thousand values take.

    Args:
        most: bytes outside strings, their quotes counted.
    """

    def __init__(self, most: int) -> None:
        self._most, self._bytes, self._within, self._backslash = most, 0, False, b""

    def read(self, piece: bytes) -> None:
        """Counts the next piece.

        Raises:
            Refused: it is too much, or no UTF-8.
        """
        if any(byte in piece for byte in (b"\0", b"\xfe", b"\xff")):  # JSON would be read as UTF-16 or 32, but not counted so
            raise Refused(400, "the body cannot be read: send one JSON object in UTF-8")
        piece = (self._backslash + piece).replace(rb"\\", b"")  # each backslash that is left escapes what follows it
        self._backslash = b"\\" if piece.endswith(b"\\") else b""
        piece = piece.removesuffix(b"\\").replace(rb"\"", b"")
        quotes = piece.count(b'"')
        self._count(quotes)
        self._count(sum(map(len, piece.split(b'"')[self._within :: 2])))
        self._within ^= quotes % 2 == 1

    def _count(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self._most:
            message = f"the body has more than {self._most:,} bytes of JSON around its strings: send fewer texts at once"
            raise Refused(413, message, "too_intricate")
