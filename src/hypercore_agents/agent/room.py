"""Room for live sessions: how many Claude CLI processes there may be, and who has to make way.

Invariants: at most `limit` sessions are resident; turns that wait are let in in the order in which they came; only an
idle session is parked, the one that was used longest ago; a turn waits no longer than `timeout` seconds and is then
told when to come back. Parking goes on when the turn that caused it is gone.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

from hypercore_agents.agent.session import Session
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.kit.tasks import Tasks


class Room:
    """Counts residents and parks idle ones for those who wait."""

    def __init__(
        self,
        limit: int,
        *,
        timeout: float,
        sessions: Callable[[], Iterable[Session]],
        tasks: Tasks,
        on_parked: Callable[[], None],
        on_wait: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.limit = limit
        self.used = 0
        self._timeout = timeout
        self._sessions = sessions
        self._tasks = tasks
        self._on_parked = on_parked
        self._on_wait = on_wait
        self.waiting = 0
        self._queue = asyncio.Lock()
        self._waiters: set[asyncio.Future[None]] = set()

    async def enter(self, session: Session) -> None:
        """Make the session resident. Raises AtCapacity when none became idle in time."""
        async with session.guard:  # a parking under way ends first; none begins while the session has a turn
            if session.resident:
                self._on_wait(0.0)
                return
        if self.used < self.limit and not self._queue.locked():
            self._admit(session)
            self._on_wait(0.0)
            return
        started = time.monotonic()
        self.waiting += 1
        try:
            async with asyncio.timeout(self._timeout), self._queue:
                while self.used >= self.limit:
                    victim = self._longest_idle()
                    if victim is None:
                        await self.wait_for_change()
                    else:
                        await asyncio.shield(self._tasks.start("park", self._park(victim)))
                self._admit(session)
        except TimeoutError:
            raise AtCapacity(
                f"all {self.limit} Claude processes of this agent are busy and none became free within "
                f"{self._timeout:g} s; try again",
                details={"live_sessions": self.used, "limit": self.limit},
            ) from None
        finally:
            self.waiting -= 1
            self._on_wait(time.monotonic() - started)

    def leave(self, session: Session) -> None:
        """Give the session's place back; its process is gone. Safe to repeat."""
        if session.resident:
            session.resident = False
            self.used -= 1
        self.changed()

    def changed(self) -> None:
        """Tell those who wait that a turn has ended or a process is gone."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_for_change(self) -> None:
        """Return at the next `changed`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _admit(self, session: Session) -> None:
        session.resident = True
        self.used += 1

    def _longest_idle(self) -> Session | None:
        idle = (s for s in self._sessions() if s.resident and s.turn is None and not s.guard.locked())
        return min(idle, key=lambda session: session.used_at, default=None)

    async def _park(self, session: Session) -> None:
        if await session.park():
            self._on_parked()
            self.leave(session)
