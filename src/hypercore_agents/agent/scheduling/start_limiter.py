"""Who may start a Claude CLI now: a start costs a quarter of a second of a core, so only a few run at a time.

Two bounds. This agent starts at most as many at a time as it has cores, fewer while its starts get too little of a
processor (`pace`). And each start holds a slot of the host, which the gateway shares among all agents of a machine:
the virtual cores of many sandboxes are more than the host has. Without an answer of the gateway the first bound alone
holds.

Invariants: sessions wait user by user (`fair_queue`); a spare begins to start only while no session starts or waits to,
here or on the host, and takes no session's place. A spare that has begun is not stopped again: most of its cost is
spent by then.

Rejected: spares under a lower scheduling priority until they are taken (the server may not raise it again, so that
every spare taken would cost the launcher a request); a fixed share of the host per agent (idle agents' shares would be
lost).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from hypercore_agents.agent.scheduling.fair_queue import FairQueue
from hypercore_agents.agent.scheduling.load import QueueWaits
from hypercore_agents.agent.scheduling.pace import Pace, Service


class HostSlots(Protocol):
    """Slots of the host for starts, shared with its other agents."""

    def start_slot(self, *, wait: bool) -> AbstractAsyncContextManager[bool]:
        """Hold a slot; yields False where there is none to be had now and `wait` is not set."""
        ...


class StartLimiter:
    """The places for starts. `on_calm` is called whenever no session starts any more; `on_wait` is told each wait."""

    def __init__(
        self, limit: int, host: HostSlots | None = None, *, on_wait: Callable[[float], None] = lambda _: None
    ) -> None:
        self.waits = QueueWaits()
        self.on_calm: Callable[[], None] = lambda: None
        self.pace = Pace(limit)
        self._host = host
        self._on_wait = on_wait
        self._queue: FairQueue[None] = FairQueue()
        self._running = 0
        self._service = Service()

    @property
    def calm(self) -> bool:
        """Whether no session starts or waits to."""
        return self._running == 0 and not self._queue

    @property
    def waiting(self) -> int:
        """How many sessions wait to start."""
        return len(self._queue)

    @property
    def seconds(self) -> float:
        """How long a start takes at present; 0 when none was measured."""
        return self._service.duration or 0.0

    def of_users(self) -> dict[str, int]:
        """Return how many starts of each user wait."""
        return self._queue.of_users()

    def expected_wait(self, user_id: str, more: int = 0) -> float:
        """Return the seconds that a start of this user would wait, behind `more` others; 0 when that is not known."""
        limit = self.pace.limit
        ahead = self._queue.ahead(user_id) + more + self._running - limit + 1
        return self._service.wait(max(0, ahead), limit)

    @contextlib.asynccontextmanager
    async def session(self, user_id: str) -> AsyncIterator[None]:
        """Hold a place for a session's start, waiting for one if need be."""
        asked = time.monotonic()
        await self._place(user_id)
        try:
            got = time.monotonic()
            async with self._slot():
                waited = time.monotonic() - asked
                self.waits.add(waited)
                self._on_wait(waited)
                yield
            self._service.took(time.monotonic() - got)
        finally:
            self._running -= 1
            self._admit()
            if self.calm:
                self.on_calm()

    @contextlib.asynccontextmanager
    async def spare(self) -> AsyncIterator[bool]:
        """Hold a slot of the host for a spare; yields False while sessions want it."""
        if not self.calm:
            yield False
        elif self._host is None:
            yield True
        else:
            async with self._host.start_slot(wait=False) as granted:
                yield granted

    def finished(self, share: float, seconds: float) -> None:
        """Adapt to a start, also a spare's, that took so long and got this share of a processor."""
        self.pace.finished(share)
        if self._service.duration is None:
            self._service.took(seconds)
        self._admit()

    async def _place(self, user_id: str) -> None:
        if self._running < self.pace.limit and not self._queue:
            self._running += 1
            return
        place = self._queue.join(user_id, None)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it was admitted in the same step
                self._running -= 1
                self._admit()
            raise
        finally:
            self._queue.leave(user_id, place)
            if not place.done() or place.cancelled():
                self._settle()

    def _settle(self) -> None:
        if self.calm:
            self.on_calm()

    def _admit(self) -> None:
        while self._running < self.pace.limit and (waiter := self._queue.take()) is not None:
            self._running += 1
            waiter[1].set_result(None)

    def _slot(self) -> AbstractAsyncContextManager[object]:
        return self._host.start_slot(wait=True) if self._host is not None else contextlib.nullcontext()
