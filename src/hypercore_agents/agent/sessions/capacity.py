"""Room for live sessions: how many Claude CLI processes there may be, and who has to make way.

Invariants: at most `limit` sessions are resident, at most `per_user` of one user; turns that wait are let in user by
user (`fair_queue`); a user who is at `per_user` waits for their own sessions alone; only an idle session is parked, the
one that was used longest ago; one with a job in the background only for a turn that waits while nobody else is idle,
since no turn is refused for a job's sake; a turn waits no longer than `timeout` seconds and is then told when to come
back. A turn that cannot end before its deadline, by what was measured of late, is refused at once instead of waiting in
vain. Parking goes on when the turn that caused it is gone. The last `reserve` places are for processes that wait for a
new session: sessions may use them, and then idle ones are parked in the background until these places are free again.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable

from hypercore_agents.agent.scheduling.fair_queue import FairQueue
from hypercore_agents.agent.scheduling.pace import Service
from hypercore_agents.agent.scheduling.start_limiter import StartLimiter
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.kit.aio.tasks import Tasks

_MARGIN = 1.25
"""An estimate is multiplied by this: a turn that is let in and ends too late has cost what another one needed."""
_LEAST_ESTIMATE = 2.0
"""Seconds; turns that are expected to wait less are never refused for it."""
_LONGEST_RETRY = 60.0


class LiveCapacity:
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
        start_limiter: StartLimiter | None = None,
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
        self._start_limiter = start_limiter
        self._queue: FairQueue[Session] = FairQueue()
        self._turns = Service()
        self._talks = Service()
        self._making_room = False
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def waiting(self) -> int:
        """How many turns wait for a place."""
        return len(self._queue)

    async def enter(self, session: Session, *, seconds: float | None = None) -> None:
        """Make the session resident; `seconds` are left until the turn's deadline.

        Raises AtCapacity: at once when the turn could not end before its deadline, else when no place became free.
        """
        async with session.guard:  # a parking under way ends first; none begins while the session has a turn
            if session.resident and session.is_live:
                self._on_wait(0.0)
                return
        self._refuse_late(session, seconds)
        if session.resident:
            self._on_wait(0.0)
            return
        if self._may_enter(session.user_id) and not any(map(self._may_enter, self._queue.users)):
            self._admit(session)
            self._on_wait(0.0)
            self._make_room()
            return
        started = time.monotonic()
        place = self._queue.join(session.user_id, session)
        self._make_room()
        try:
            async with asyncio.timeout(self._timeout):
                await place
        except TimeoutError:
            raise self._refusal(session.user_id) from None
        finally:
            self._queue.leave(session.user_id, place)
            self._on_wait(time.monotonic() - started)

    def took(self, held: float, talked: float) -> None:
        """Note for how many seconds a turn held its place, and for how many of them its CLI worked on it."""
        self._turns.took(held)
        self._talks.took(talked)

    def of_users(self) -> Counter[str]:
        """Return how many processes each user has."""
        return Counter(session.user_id for session in self._sessions() if session.resident)

    def expected_wait(self, user_id: str, *, starts: bool = True) -> float:
        """Return the seconds that a turn of this user would wait for its process; 0 when that is not known.

        `starts`: whether it must be started for the turn.
        """
        ahead = self._queue.ahead(user_id)
        idle = sum(1 for s in self._sessions() if s.resident and s.turn is None)
        behind = max(0, ahead + 1 - (self.limit - self.used) - idle)
        place = self._turns.wait(behind, self.limit)
        if self._start_limiter is None or not starts:
            return place
        return max(place, self._start_limiter.expected_wait(user_id, ahead))

    def _refuse_late(self, session: Session, seconds: float | None) -> None:
        """Refuse a turn that would end after its deadline, by what was measured of late."""
        starts = not session.has_spare
        wait = self.expected_wait(session.user_id, starts=starts)
        if seconds is None or wait < _LEAST_ESTIMATE:
            return
        start = self._start_limiter.seconds if self._start_limiter is not None and starts else 0.0
        expected = _MARGIN * wait + start + min(self._talks.duration or 0.0, seconds / 2)
        if expected > seconds:
            raise AtCapacity(
                f"the agent is overloaded: this turn would wait about {wait:.0f} s for a Claude process and could not "
                f"end within the {seconds:.0f} s that are left of its timeout; it was not begun, try again later",
                details={"expected_wait_seconds": round(wait, 1), "waiting": self.waiting, "seconds_left": seconds},
                retry_after=min(_LONGEST_RETRY, max(1.0, expected - seconds)),
            )

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
        return self.of_users()[user_id]

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
        if self._queue and not any(map(self._has_share_left, self._queue.users)):
            return next(filter(None, map(self._longest_idle, self._queue.users)), None)
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
        while (waiter := self._queue.take(self._may_enter)) is not None:
            session, place = waiter
            self._admit(session)
            place.set_result(None)
        if not self._making_room:
            victim = self._makes_way()
            if victim is not None:
                self._making_room = True
                self._tasks.start("park", self._park(victim))

    async def _park(self, victim: Session) -> None:
        try:
            await self.park(victim, "another session's turn needed its place")
        finally:
            self._making_room = False
            self._make_room()
