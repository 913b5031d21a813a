"""Pooled connections: a bound on open connections, reuse of the most recently used one, expiry of idle ones.

Invariants: `open` counts every connection from before it is made until it is closed. Waiters get free slots in the
order of their arrival; a slot given to a cancelled waiter goes to the next one.
"""

import asyncio
import functools
import ssl
from collections import deque
from typing import NamedTuple

from hypercore_agents.kit.relay.connection import Connection
from hypercore_agents.kit.relay.delayed_calls import DelayedCalls

SHORT_REQUEST_SECONDS = 0.02
"""Requests that end within this time cost no timer of their own."""


class Origin(NamedTuple):
    """Scheme, host and port of an upstream."""

    secure: bool
    host: str
    port: int


class Pool:
    """Connections by origin: at most `connections` open ones; idle ones are closed after `keep_alive` seconds."""

    def __init__(self, *, connections: int, keep_alive: float) -> None:
        self.open = 0
        self._limit = connections
        self._keep_alive = keep_alive
        self._idle: dict[Origin, deque[Connection]] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._busy: set[Connection] = set()
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None
        self._closed = False

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of all connections; cached because asyncio makes a system call to find it."""
        return asyncio.get_running_loop()

    @functools.cached_property
    def delayed_calls(self) -> DelayedCalls:
        """Calls for requests that run longer than `SHORT_REQUEST_SECONDS`."""
        return DelayedCalls(self.loop, SHORT_REQUEST_SECONDS)

    def take_idle(self, origin: Origin) -> Connection | None:
        """Return an idle connection that the upstream has not closed, None if there is none."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.reusable and not connection.is_stale():
                self._busy.add(connection)
                return connection
            self._drop(connection)
        return None

    async def connect(self, origin: Origin) -> Connection:
        """Return a new connection, after waiting for a free slot. Raises OSError when connecting fails."""
        if self._closed:
            raise ConnectionError("the pool is closed")
        await self._acquire_slot()
        try:
            connection = await self._make(origin)
        except BaseException:
            self._free_slot()
            raise
        self._busy.add(connection)
        return connection

    def give_back(self, origin: Origin, connection: Connection) -> None:
        """Take a connection back after a request: retain it for the next one or close it."""
        self._busy.discard(connection)
        if not connection.release() or self._closed or self._waiting:
            self._drop(connection)
            return
        loop = self.loop
        connection.idle_since = loop.time()
        if (idle := self._idle.get(origin)) is None:
            idle = self._idle[origin] = deque()
        idle.append(connection)
        if self._expiry_timer is None:
            self._expiry_timer = loop.call_later(self._keep_alive, self._close_expired)

    async def close(self) -> None:
        """Abort every connection, busy ones included, and let the event loop process it."""
        self._closed = True
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        if "delayed_calls" in vars(self):
            self.delayed_calls.close()
        for connection in [*self._busy, *(connection for idle in self._idle.values() for connection in idle)]:
            connection.abort()
        self._idle.clear()
        self._busy.clear()
        await asyncio.sleep(0)

    async def _make(self, origin: Origin) -> Connection:
        loop, delayed_calls = self.loop, self.delayed_calls
        if origin.secure and self._tls is None:
            self._tls = ssl.create_default_context()
        _, connection = await loop.create_connection(
            lambda: Connection(loop, delayed_calls), origin.host, origin.port, ssl=self._tls if origin.secure else None
        )
        return connection

    async def _acquire_slot(self) -> None:
        if self.open < self._limit and not self._waiting:
            self.open += 1
            return
        if self.open >= self._limit and self._close_longest_idle():
            self.open += 1
            return
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._free_slot()  # the slot arrived together with the cancellation
            raise

    def _close_longest_idle(self) -> bool:
        idle = [connections for connections in self._idle.values() if connections]
        if not idle:
            return False
        self._drop(min(idle, key=lambda connections: connections[0].idle_since).popleft())
        return True

    def _drop(self, connection: Connection) -> None:
        connection.abort()
        self._free_slot()

    def _free_slot(self) -> None:
        self.open -= 1
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self.open += 1
                waiter.set_result(None)
                return

    def _close_expired(self) -> None:
        loop = self.loop
        oldest = loop.time() - self._keep_alive
        for origin, idle in list(self._idle.items()):
            while idle and (idle[0].idle_since <= oldest or not idle[0].reusable):
                self._drop(idle.popleft())
            if not idle:
                del self._idle[origin]
        self._expiry_timer = loop.call_later(self._keep_alive / 2, self._close_expired) if self._idle else None
