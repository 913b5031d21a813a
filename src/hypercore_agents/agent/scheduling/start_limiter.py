"""The start limiter: bounds how many Claude CLIs start at a time, since each start costs 0.25 s of a core.

There are two bounds. This agent runs at most as many starts as it has cores, and fewer while its starts get too small a
share of a processor (`pace`). In addition, each start holds a start slot of the host, which the gateway shares among
all agents of a machine: the virtual cores of all sandboxes together are more than the host has. If the gateway does not
answer, only the first bound holds.

Invariants: sessions wait user by user (`fair_queue`). A prewarmed CLI begins to start only while no session starts or
waits to, here or on the host, and takes no session's turn. A prewarmed start that has begun is not stopped: most of its
cost is already spent.

Rejected: a lower scheduling priority for prewarmed CLIs until a session takes them (the server cannot raise it again,
so each one taken would cost the launcher a request); a fixed share of the host per agent (the shares of idle agents
would be lost).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from hypercore_agents.agent.scheduling.fair_queue import FairQueue
from hypercore_agents.agent.scheduling.load import QueueWaits
from hypercore_agents.agent.scheduling.pace import Pace, ServiceTime


class HostSlots(Protocol):
    """Start slots of the host, shared with its other agents."""

    def start_slot(self, *, wait: bool) -> AbstractAsyncContextManager[bool]:
        """Hold a slot; yields False if none is free now and `wait` is false."""
        ...


class StartLimiter:
    """Bounds the starts. Calls `on_idle` when the last session has started, and `on_wait` with each session's wait."""

    def __init__(
        self, limit: int, host: HostSlots | None = None, *, on_wait: Callable[[float], None] = lambda _: None
    ) -> None:
        self.waits = QueueWaits()
        self.on_idle: Callable[[], None] = lambda: None
        self.pace = Pace(limit)
        self._host = host
        self._on_wait = on_wait
        self._queue: FairQueue[None] = FairQueue()
        self._running = 0
        self._start_time = ServiceTime()

    @property
    def idle(self) -> bool:
        """Whether no session starts or waits to."""
        return self._running == 0 and not self._queue

    @property
    def waiting(self) -> int:
        """How many sessions wait to start."""
        return len(self._queue)

    @property
    def start_seconds(self) -> float:
        """How long a start takes at present; 0 when none was measured."""
        return self._start_time.duration or 0.0

    def count_by_user(self) -> dict[str, int]:
        """Return how many starts of each user wait."""
        return self._queue.count_by_user()

    def expected_wait(self, user_id: str, more: int = 0) -> float:
        """Return the seconds that a start of this user would wait, behind `more` others; 0 when that is not known."""
        limit = self.pace.limit
        ahead = self._queue.ahead(user_id) + more + self._running - limit + 1
        return self._start_time.wait(max(0, ahead), limit)

    @contextlib.asynccontextmanager
    async def session_slot(self, user_id: str) -> AsyncIterator[None]:
        """Hold a start slot for a session, waiting for one if necessary."""
        began = time.monotonic()
        await self._enter(user_id)
        try:
            entered = time.monotonic()
            async with self._host_slot():
                waited = time.monotonic() - began
                self.waits.add(waited)
                self._on_wait(waited)
                yield
            self._start_time.record(time.monotonic() - entered)
        finally:
            self._running -= 1
            self._admit()
            self._report_idle()

    @contextlib.asynccontextmanager
    async def prewarmed_slot(self) -> AsyncIterator[bool]:
        """Hold a start slot of the host for a prewarmed CLI; yields False while sessions need the slots."""
        if not self.idle:
            yield False
        elif self._host is None:
            yield True
        else:
            async with self._host.start_slot(wait=False) as granted:
                yield granted

    def record_start(self, share: float, seconds: float) -> None:
        """Adapt to a start, of a session or prewarmed, that took `seconds` and got this share of a processor."""
        self.pace.record_start(share)
        if self._start_time.duration is None:
            self._start_time.record(seconds)
        self._admit()

    async def _enter(self, user_id: str) -> None:
        if self._running < self.pace.limit and not self._queue:
            self._running += 1
            return
        admitted = self._queue.join(user_id, None)
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled():  # it was admitted in the same step
                self._running -= 1
                self._admit()
            raise
        finally:
            self._queue.leave(user_id, admitted)
            if not admitted.done() or admitted.cancelled():
                self._report_idle()

    def _report_idle(self) -> None:
        if self.idle:
            self.on_idle()

    def _admit(self) -> None:
        while self._running < self.pace.limit and (waiter := self._queue.take()) is not None:
            self._running += 1
            waiter[1].set_result(None)

    def _host_slot(self) -> AbstractAsyncContextManager[object]:
        return self._host.start_slot(wait=True) if self._host is not None else contextlib.nullcontext()
