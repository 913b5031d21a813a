"""uvicorn's HTTP protocol with one system call where it makes two: an answer's head waits for the body beside it.

What is written within one turn of the event loop leaves together, at that turn's end. Nothing waits longer: an event of
a stream leaves in the same turn in which it was written.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class CorkingProtocol(HttpToolsProtocol):
    """Pass it to uvicorn as `http`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(_Corked(transport, self.loop.call_soon))  # type: ignore[arg-type]


class _Corked:
    """A transport whose writes are joined. Everything else goes straight to the real one, after what waits."""

    def __init__(self, transport: asyncio.Transport, call_soon: Callable[[Callable[[], None]], Any]) -> None:
        self._transport = transport
        self._call_soon = call_soon
        self._waiting: list[bytes] = []
        self.is_closing = transport.is_closing
        self.get_extra_info = transport.get_extra_info
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.abort = transport.abort

    def write(self, data: bytes) -> None:
        if not data:
            return
        if not self._waiting:
            self._call_soon(self._flush)
        self._waiting.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._flush()
        self._transport.set_protocol(protocol)

    def _flush(self) -> None:
        waiting = self._waiting
        if waiting:
            self._waiting = []
            if not self._transport.is_closing():
                self._transport.write(waiting[0] if len(waiting) == 1 else b"".join(waiting))
