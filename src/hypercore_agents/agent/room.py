"""Room for live sessions: how many Claude CLI processes there may be, and who has to make way.

Invariants: at most `limit` sessions are resident, at most `per_user` of one user; turns that wait are let in user by
user in turn, and for each user in the order in which they came, so that one who asks for much does not keep the others
waiting; a user who is at `per_user` waits for their own sessions alone; only an idle session is parked, the one that
was used longest ago; one with a job in the background only for a turn that waits while nobody else is idle, since no
turn is refused for a job's sake; a turn waits no longer than `timeout` seconds and is then told when to come back.
Parking goes on when the turn that caused it is gone. The last `reserve` places are for processes that wait for a new
session: sessions may use them, and then idle ones are parked in the background until these places are free again.
"""

import asyncio
import time
from collections import deque
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
        per_user: int | None = None,
        timeout: float,
        sessions: Callable[[], Iterable[Session]],
        tasks: Tasks,
        on_parked: Callable[[], None],
        on_wait: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.limit = limit
        self.per_user = limit if per_user is None else per_user
        self.used = 0
        self.reserve = 0
        self._timeout = timeout
        self._sessions = sessions
        self._tasks = tasks
        self._on_parked = on_parked
        self._on_wait = on_wait
        self.waiting = 0
        self._queue: dict[str, deque[tuple[Session, asyncio.Future[None]]]] = {}
        self._making_room = False
        self._waiters: set[asyncio.Future[None]] = set()

    async def enter(self, session: Session) -> None:
        """Make the session resident. Raises AtCapacity when none became idle in time."""
        async with session.guard:  # a parking under way ends first; none begins while the session has a turn
            if session.resident:
                self._on_wait(0.0)
                return
        if self._may_enter(session.user_id) and not any(map(self._may_enter, self._queue)):
            self._admit(session)
            self._on_wait(0.0)
            self._make_room()
            return
        started = time.monotonic()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line = self._queue.setdefault(session.user_id, deque())
        line.append((session, place))
        self.waiting += 1
        self._make_room()
        try:
            async with asyncio.timeout(self._timeout):
                await place
        except TimeoutError:
            raise self._refusal(session.user_id) from None
        finally:
            if (session, place) in line:
                line.remove((session, place))
                if not line:
                    self._queue.pop(session.user_id, None)
            self.waiting -= 1
            self._on_wait(time.monotonic() - started)

    async def park(self, session: Session, why: str) -> None:
        """Park an idle session and give its place back; `why` is told to its user where that ends a job."""
        if await session.park(why):
            self._on_parked()
            self.leave(session)

    def leave(self, session: Session) -> None:
        """Give the session's place back; its process is gone. Safe to repeat."""
        if session.resident:
            session.resident = False
            self.used -= 1
        self.changed()

    def changed(self) -> None:
        """Tell those who wait that a turn has ended or a process is gone."""
        self._make_room()
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

    def _used_by(self, user_id: str) -> int:
        return sum(1 for session in self._sessions() if session.resident and session.user_id == user_id)

    def _has_share_left(self, user_id: str) -> bool:
        return self.per_user >= self.limit or self._used_by(user_id) < self.per_user

    def _may_enter(self, user_id: str) -> bool:
        return self.used < self.limit and self._has_share_left(user_id)

    def _refusal(self, user_id: str) -> AtCapacity:
        if not self._has_share_left(user_id):
            whose, limit, used = "that one user may have on this agent", self.per_user, self._used_by(user_id)
        else:
            whose, limit, used = "of this agent", self.limit, self.used
        return AtCapacity(
            f"all {limit} Claude processes {whose} are busy and none became free within {self._timeout:g} s; try again",
            details={"live_sessions": used, "limit": limit},
        )

    def _makes_way(self) -> Session | None:
        """Return the session to park next: an idle one of a user who waits and is at their limit, or anybody's."""
        if self._queue and not any(map(self._has_share_left, self._queue)):
            return next(filter(None, map(self._longest_idle, self._queue)), None)
        return self._longest_idle() if self._queue or self.used > self.limit - self.reserve else None

    def _longest_idle(self, user_id: str | None = None) -> Session | None:
        idle = (
            s
            for s in self._sessions()
            if s.resident and s.turn is None and not s.guard.locked() and user_id in (None, s.user_id)
        )
        makes_way = (s for s in idle if self._queue or not s.jobs.running)
        return min(makes_way, key=lambda session: (session.jobs.running, session.used_at), default=None)

    def _make_room(self) -> None:
        """Let in who can be let in; for the rest, park the session that was used longest ago, one at a time."""
        while (user := next(filter(self._may_enter, self._queue), None)) is not None:
            self._let_in(user)
        if not self._making_room:
            victim = self._makes_way()
            if victim is not None:
                self._making_room = True
                self._tasks.start("park", self._park(victim))

    def _let_in(self, user: str) -> None:
        line = self._queue.pop(user)
        session, place = line.popleft()
        if line:
            self._queue[user] = line  # behind the other users
        if not place.done():
            self._admit(session)
            place.set_result(None)

    async def _park(self, victim: Session) -> None:
        try:
            await self.park(victim, "another session's turn needed its place")
        finally:
            self._making_room = False
            self._make_room()
