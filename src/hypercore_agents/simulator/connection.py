"""The client's connection, as far as ASGI does not show it: it can be reset or cut, and its loss wakes a sleeper.

uvicorn's protocol is extended by one scope extension, so that the app stays an ASGI app: under another server it gets
a connection that cannot break on purpose. Rejected: waiting for `http.disconnect` beside every stream, which costs a
task per stream; `asyncio.sleep`, which leaves a stream of a client that is gone counted as open.
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
        """Sleep until the loop's clock says `when` (seconds); returns False, at once, when the client is gone."""
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
        """Close after what was sent, in the middle of the answer; returns when it is closed."""
        if self._transport is not None:
            self._transport.close()
        await self._until_lost()

    async def reset(self) -> None:
        """Close at once with a TCP reset; returns when it is closed."""
        if self._transport is not None:
            with contextlib.suppress(OSError, AttributeError):
                sock = self._transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._transport.abort()
        await self._until_lost()

    def abort(self) -> None:
        """Close without ceremony: the server is going down."""
        if self._transport is not None:
            self._transport.abort()

    def was_lost(self) -> None:
        """Note that the connection is gone, and wake who sleeps on it."""
        self.lost = True
        if self._waiter is not None:
            _wake(self._waiter)

    async def _until_lost(self) -> None:
        if self._transport is None:
            raise ConnectionAbortedError("the simulator breaks this connection on purpose")
        if await self.sleep_until(self._loop.time() + _CLOSING_SECONDS):
            self._transport.abort()  # the client does not read what is left


class Protocol(StrictProtocol):
    """uvicorn's HTTP protocol that hands its Connection to the app."""

    connection: Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember the transport."""
        super().connection_made(transport)
        self.connection = Connection(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the app."""
        super().connection_lost(exc)
        self.connection.was_lost()

    def on_message_begin(self) -> None:
        """Put the connection into the scope."""
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: self.connection}  # type: ignore[dict-item]


def connection_of(scope: Any) -> Connection:
    """Return the connection of a request."""
    found = (scope.get("extensions") or {}).get(EXTENSION)
    return found if isinstance(found, Connection) else Connection()


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
