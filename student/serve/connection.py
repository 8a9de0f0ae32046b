"""Connections over which a request's head must come in time."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0  # for the head of a request, from its first byte; for the first one, from when the client connected
HEAD_BYTES = 512 << 10  # of a head that is not whole; a socket gives half of that at once, so it may begin behind a body


class Connection(HttpToolsProtocol):
    """One that is closed when a head does not come in time or grows too large, both of which uvicorn leaves to others."""

    _timer: asyncio.TimerHandle | None = None
    _head: int | None = None  # bytes of the head that is being received

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for the first head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Waits for the rest, unless a request is being answered."""
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
        if (self._head or 0) > HEAD_BYTES:
            self.transport.close()
        elif self.busy:
            self._wait_no_more()
        elif self._timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._wait_no_more()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head = 0

    def on_headers_complete(self) -> None:
        """It is whole."""
        super().on_headers_complete()
        self._head = None

    @property
    def busy(self) -> bool:
        """Whether a request of it is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def unanswered(self) -> int:
        """Requests of it whose answer is not wholly handed to the kernel."""
        first = self.busy or self.transport.get_write_buffer_size() > 0
        return first + len(self.pipeline)

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
