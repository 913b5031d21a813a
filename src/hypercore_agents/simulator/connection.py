"""A client's connection below ASGI: reset it, cut it, and sleep until a time or until the client disconnects.

A scope extension adds the connection to the requests of uvicorn's protocol, so the app remains an ASGI app; under
another server it gets a connection that it cannot break. Rejected: waiting for `http.disconnect` beside every stream,
which costs a task per stream; `asyncio.sleep`, which counts a stream as open after its client has disconnected.
"""

import asyncio
import contextlib
import socket
import struct
from typing import Any

from hypercore_agents.http.strict import StrictProtocol

EXTENSION = "hypercore.simulator.connection"
_CLOSING_SECONDS = 10.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger, see socket(7)


class Connection:
    """One client's connection. Serves one request at a time, as HTTP/1.1 does."""

    __slots__ = ("_loop", "_transport", "_waiter", "lost")

    def __init__(self, transport: asyncio.Transport | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._waiter: asyncio.Future[None] | None = None
        self.lost = False

    async def sleep_until(self, when: float) -> bool:
        """Sleep until the loop's time `when`, in seconds; return False immediately if the client disconnects."""
        if self.lost:
            return False
        self._waiter = waiter = self._loop.create_future()
        timer = self._loop.call_at(when, _wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None
        return not self.lost

    async def cut(self) -> None:
        """Close in the middle of the answer, after the data already sent; return once closed."""
        if self._transport is not None:
            self._transport.close()
        await self._until_lost()

    async def reset(self) -> None:
        """Close immediately with a TCP reset; return once closed."""
        if self._transport is not None:
            with contextlib.suppress(OSError, AttributeError):
                sock = self._transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._transport.abort()
        await self._until_lost()

    def abort(self) -> None:
        """Close immediately without waiting: the server is shutting down."""
        if self._transport is not None:
            self._transport.abort()

    def was_lost(self) -> None:
        """Record the loss of the connection and end a pending `sleep_until`."""
        self.lost = True
        if self._waiter is not None:
            _wake(self._waiter)

    async def _until_lost(self) -> None:
        if self._transport is None:
            raise ConnectionAbortedError("the simulator breaks this connection on purpose")
        if await self.sleep_until(self._loop.time() + _CLOSING_SECONDS):
            self._transport.abort()  # the client does not read the remaining data


class Protocol(StrictProtocol):
    """uvicorn's HTTP protocol, with its Connection in the scope of each request."""

    connection: Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Create the connection."""
        super().connection_made(transport)
        self.connection = Connection(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Mark the connection as lost."""
        super().connection_lost(exc)
        self.connection.was_lost()

    def on_message_begin(self) -> None:
        """Add the connection to the scope."""
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: self.connection}  # type: ignore[dict-item]


def connection_of(scope: Any) -> Connection:
    """Return the connection of a request."""
    found = (scope.get("extensions") or {}).get(EXTENSION)
    return found if isinstance(found, Connection) else Connection()


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
