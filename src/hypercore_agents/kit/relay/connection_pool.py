"""Pooled connections: at most so many open at once, idle ones kept for a while, the one used last taken first.

Invariants: `open` counts every connection from before it is made until it is cut; whoever waits for a place is woken
in order, and a place that is given to somebody who no longer waits is passed on.
"""

import asyncio
import functools
import ssl
from collections import deque
from typing import NamedTuple

from hypercore_agents.kit.relay.connection import Connection
from hypercore_agents.kit.relay.delayed_calls import DelayedCalls

SHORT_REQUEST_SECONDS = 0.02
"""What ends sooner costs no timer of its own."""


class Origin(NamedTuple):
    """Where a connection goes."""

    secure: bool
    host: str
    port: int


class Pool:
    """Connections by origin. `connections` bounds the open ones; idle ones are closed after `keep_alive` seconds."""

    def __init__(self, *, connections: int, keep_alive: float) -> None:
        self.open = 0
        self._limit = connections
        self._keep_alive = keep_alive
        self._idle: dict[Origin, deque[Connection]] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._busy: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None
        self._closed = False

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of every connection here; remembered, since asking asyncio costs a system call."""
        return asyncio.get_running_loop()

    @functools.cached_property
    def lasting(self) -> DelayedCalls:
        """Calls for what lasts, in that loop."""
        return DelayedCalls(self.loop, SHORT_REQUEST_SECONDS)

    def take_idle(self, origin: Origin) -> Connection | None:
        """Return a connection that is free and alive as far as its socket knows, None when there is none."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.reusable and not connection.is_stale():
                self._busy.add(connection)
                return connection
            self._drop(connection)
        return None

    async def connect(self, origin: Origin) -> Connection:
        """Return a new connection, when there is a place for one. Raises OSError when it cannot be made."""
        if self._closed:
            raise ConnectionError("the pool is closed")
        await self._place()
        try:
            connection = await self._make(origin)
        except BaseException:
            self._free()
            raise
        self._busy.add(connection)
        return connection

    def give_back(self, origin: Origin, connection: Connection) -> None:
        """Take a connection back: kept when it can serve another request, else cut."""
        self._busy.discard(connection)
        if not connection.release() or self._closed or self._waiting:
            self._drop(connection)
            return
        loop = self.loop
        connection.idle_since = loop.time()
        if (kept := self._idle.get(origin)) is None:
            kept = self._idle[origin] = deque()
        kept.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._keep_alive, self._sweep)

    async def close(self) -> None:
        """Cut every connection, busy ones too, and let the event loop see it."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        if "lasting" in vars(self):
            self.lasting.close()
        for connection in [*self._busy, *(connection for kept in self._idle.values() for connection in kept)]:
            connection.abort()
        self._idle.clear()
        self._busy.clear()
        await asyncio.sleep(0)

    async def _make(self, origin: Origin) -> Connection:
        loop, lasting = self.loop, self.lasting
        if origin.secure and self._tls is None:
            self._tls = ssl.create_default_context()
        _, connection = await loop.create_connection(
            lambda: Connection(loop, lasting), origin.host, origin.port, ssl=self._tls if origin.secure else None
        )
        return connection

    async def _place(self) -> None:
        if self.open < self._limit and not self._waiting:
            self.open += 1
            return
        if self.open >= self._limit and self._cut_longest_idle():
            self.open += 1
            return
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._free()  # a place came just now: on to the next
            raise

    def _cut_longest_idle(self) -> bool:
        kept = [connections for connections in self._idle.values() if connections]
        if not kept:
            return False
        self._drop(min(kept, key=lambda connections: connections[0].idle_since).popleft())
        return True

    def _drop(self, connection: Connection) -> None:
        connection.abort()
        self._free()

    def _free(self) -> None:
        self.open -= 1
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self.open += 1
                waiter.set_result(None)
                return

    def _sweep(self) -> None:
        loop = self.loop
        oldest = loop.time() - self._keep_alive
        for origin, kept in list(self._idle.items()):
            while kept and (kept[0].idle_since <= oldest or not kept[0].reusable):
                self._drop(kept.popleft())
            if not kept:
                del self._idle[origin]
        self._sweeper = loop.call_later(self._keep_alive / 2, self._sweep) if self._idle else None
