"""The capacity of an agent: how many sessions may be live at a time, and which idle one is parked for a waiting turn.

Invariants:
- At most `limit` sessions hold a slot, at most `per_user` of one user.
- Waiting turns are admitted user by user (`fair_queue`); a user at `per_user` waits only for their own sessions.
- Only an idle session is parked, the least recently used one first. A session with a background job is parked only for
  a waiting turn, and only when no other session is idle: a job never causes the refusal of a turn.
- A turn waits at most `timeout` seconds; the refusal says when to retry. A turn that cannot end before its deadline, by
  recent measurements, is refused at once. A parking that has begun continues even if the waiting turn gives up.
- The last `reserve` slots are for prewarmed CLIs. Sessions may use them; idle sessions are then parked in the
  background until these slots are free again.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from hypercore_agents.agent.scheduling.fair_queue import FairQueue
from hypercore_agents.agent.scheduling.pace import ServiceTime
from hypercore_agents.agent.scheduling.start_limiter import StartLimiter
from hypercore_agents.agent.sessions.background_jobs import BackgroundJobs
from hypercore_agents.agent.sessions.cli_state import CliStatus
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.kit.aio.tasks import Tasks

_MARGIN = 1.25
"""Factor on an estimate: a turn that is admitted and ends too late has used a slot that another turn needed."""
_LEAST_ESTIMATE = 2.0
"""Seconds; turns that are expected to wait less are never refused for it."""
_LONGEST_RETRY = 60.0


class SlotHolder(Protocol):
    """What capacity and parking need of a session (`session.py`, which does not import this module)."""

    session_id: str
    user_id: str
    used_at: float
    guard: asyncio.Lock
    status: CliStatus
    jobs: BackgroundJobs

    @property
    def turn(self) -> object | None:
        """The turn that runs, if any."""
        ...

    @property
    def has_prewarmed(self) -> bool:
        """Whether a prewarmed CLI suits the session."""
        ...

    async def park(self, reason: str) -> bool:
        """End the idle CLI; return False when a turn began first."""
        ...

    async def check_jobs(self) -> bool:
        """Return whether a background job runs."""
        ...


class LiveCapacity:
    """Counts the sessions that hold a slot, and parks idle ones for waiting turns."""

    def __init__(
        self,
        limit: int,
        *,
        per_user: int | None = None,
        timeout: float,
        sessions: Callable[[], Iterable[SlotHolder]],
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
        self._queue: FairQueue[SlotHolder] = FairQueue()
        self._slot_times = ServiceTime()
        self._cli_times = ServiceTime()
        self._is_parking = False
        self._observers: set[asyncio.Future[None]] = set()

    @property
    def waiting(self) -> int:
        """How many turns wait for a slot."""
        return len(self._queue)

    async def enter(self, session: SlotHolder, *, seconds: float | None = None) -> None:
        """Give the session a slot; `seconds` are left until the turn's deadline.

        Raises AtCapacity: at once when the turn could not end before its deadline, else when no slot became free.
        """
        async with session.guard:  # a parking in progress ends first; none begins while the session has a turn
            if session.status.holds_slot and (session.status.is_starting or session.status.is_running):
                self._on_wait(0.0)
                return
        self._refuse_late(session, seconds)
        if session.status.holds_slot:
            self._on_wait(0.0)
            return
        if self._may_enter(session.user_id) and not any(map(self._may_enter, self._queue.users)):
            self._admit(session)
            self._on_wait(0.0)
            self._serve()
            return
        started = time.monotonic()
        admitted = self._queue.join(session.user_id, session)
        self._serve()
        try:
            async with asyncio.timeout(self._timeout):
                await admitted
        except TimeoutError:
            raise self._refusal(session.user_id) from None
        finally:
            self._queue.leave(session.user_id, admitted)
            self._on_wait(time.monotonic() - started)

    def record_turn(self, with_slot: float, with_cli: float) -> None:
        """Record for how many seconds a turn held its slot, and for how many of them its CLI worked on it."""
        self._slot_times.record(with_slot)
        self._cli_times.record(with_cli)

    def count_by_user(self) -> Counter[str]:
        """Return how many slots each user's sessions hold."""
        return Counter(session.user_id for session in self._sessions() if session.status.holds_slot)

    def expected_wait(self, user_id: str, *, starts: bool = True) -> float:
        """Return the seconds that a turn of this user would wait for its CLI; 0 when that is not known.

        `starts`: whether a CLI has to be started for the turn.
        """
        ahead = self._queue.ahead(user_id)
        idle = sum(1 for s in self._sessions() if s.status.holds_slot and s.turn is None)
        behind = max(0, ahead + 1 - (self.limit - self.used) - idle)
        wait = self._slot_times.wait(behind, self.limit)
        if self._start_limiter is None or not starts:
            return wait
        return max(wait, self._start_limiter.expected_wait(user_id, ahead))

    def _refuse_late(self, session: SlotHolder, seconds: float | None) -> None:
        """Refuse a turn that would end after its deadline, by recent measurements."""
        starts = not session.has_prewarmed
        wait = self.expected_wait(session.user_id, starts=starts)
        if seconds is None or wait < _LEAST_ESTIMATE:
            return
        start = self._start_limiter.start_seconds if self._start_limiter is not None and starts else 0.0
        expected = _MARGIN * wait + start + min(self._cli_times.duration or 0.0, seconds / 2)
        if expected > seconds:
            raise AtCapacity(
                f"the agent is overloaded: this turn would wait about {wait:.0f} s for a Claude process and could not "
                f"end within the {seconds:.0f} s that are left of its timeout; it was not begun, try again later",
                details={"expected_wait_seconds": round(wait, 1), "waiting": self.waiting, "seconds_left": seconds},
                retry_after=min(_LONGEST_RETRY, max(1.0, expected - seconds)),
            )

    async def park(self, session: SlotHolder, reason: str) -> None:
        """Park an idle session and release its slot; `reason` is reported to the user if a job ends with its CLI."""
        if await session.park(reason):
            self._on_parked()
            self.release(session)

    def release(self, session: SlotHolder) -> None:
        """Release the session's slot; its CLI has ended. Idempotent."""
        if session.status.holds_slot:
            session.status.release_slot()
            self.used -= 1
        self.notify_change()

    def notify_change(self) -> None:
        """Admit waiting turns, and wake `wait_for_change`: a turn or a CLI has ended."""
        self._serve()
        for observer in self._observers:
            if not observer.done():
                observer.set_result(None)

    async def wait_for_change(self) -> None:
        """Wait for the next `notify_change`."""
        observer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._observers.add(observer)
        try:
            await observer
        finally:
            self._observers.discard(observer)

    def _admit(self, session: SlotHolder) -> None:
        session.status.take_slot()
        self.used += 1

    def _used_by(self, user_id: str) -> int:
        return self.count_by_user()[user_id]

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
            f"all {limit} Claude processes {whose} are busy, and none became free within {self._timeout:g} s; "
            "try again",
            details={"live_sessions": used, "limit": limit},
        )

    def _next_to_park(self) -> SlotHolder | None:
        """Return the session to park next: of any user, unless all waiting users are at their own limit."""
        if self._queue and not any(map(self._has_share_left, self._queue.users)):
            return next(filter(None, map(self._longest_idle, self._queue.users)), None)
        return self._longest_idle() if self._queue or self.used > self.limit - self.reserve else None

    def _longest_idle(self, user_id: str | None = None) -> SlotHolder | None:
        idle = (
            s
            for s in self._sessions()
            if s.status.holds_slot and s.turn is None and not s.guard.locked() and user_id in (None, s.user_id)
        )
        candidates = (s for s in idle if self._queue or not s.jobs.running)
        return min(candidates, key=lambda session: (session.jobs.running, session.used_at), default=None)

    def _serve(self) -> None:
        """Admit the turns that may enter; for the others, park idle sessions, one at a time."""
        while (waiter := self._queue.take(self._may_enter)) is not None:
            session, admitted = waiter
            self._admit(session)
            admitted.set_result(None)
        if not self._is_parking:
            victim = self._next_to_park()
            if victim is not None:
                self._is_parking = True
                self._tasks.start("park", self._park(victim))

    async def _park(self, victim: SlotHolder) -> None:
        try:
            await self.park(victim, "another session's turn needed its capacity")
        finally:
            self._is_parking = False
            self._serve()
