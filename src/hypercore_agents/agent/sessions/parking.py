"""Which sessions stay live when nobody waits for their places: not for long, and not beyond the memory.

At each look, of the sessions that run no turn: those idle longer than `park_after` are parked; then those whose CLI has
grown past `recycle_mb` (their next turn begins in a fresh one); then, while all CLIs together have more private memory
than `memory_mb`, the one used longest ago. A session with a turn, and so with a question to its user, is never touched.

One in which something that a turn left running still runs is busy, not idle, until `background_max` after its last
turn: then it is parked, which ends the job. Where memory is short it goes last. When its job ends by itself, it is idle
from then on.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from hypercore_agents.agent.isolation.processes import private_memory_mb
from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.session import Session

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Policy:
    """`park_after` and `background_max` in seconds; `memory_mb`: private memory of all CLIs; `recycle_mb`: of one."""

    park_after: float
    memory_mb: int
    recycle_mb: int
    background_max: float = 600.0

    def every(self) -> float:
        """Return how often to look, in seconds."""
        return max(0.05, min(5.0, self.park_after / 4, self.background_max / 4))


class Parking:
    """Looks when told to."""

    def __init__(
        self,
        policy: Policy,
        sessions: Callable[[], Iterable[Session]],
        room: LiveCapacity,
        measure: Callable[[int], float] = private_memory_mb,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._sessions = sessions
        self._room = room
        self._measure = measure
        self._clock = clock
        self.over = False

    async def look(self) -> None:
        """Park what must be parked."""
        policy = self._policy
        for session in [s for s in self._sessions() if s.resident and s.turn is None and s.jobs.running]:
            await session.look_at_jobs()
        now = self._clock()
        idle = sorted(
            (s for s in self._sessions() if s.resident and s.turn is None), key=lambda s: (s.jobs.running, s.used_at)
        )
        for session in idle:
            if now - session.used_at >= (policy.background_max if session.jobs.running else policy.park_after):
                await self._park(session, "idle")
        sizes = {s: self._size(s) for s in self._sessions() if s.resident}
        for session in idle:
            if sizes.get(session, 0.0) > policy.recycle_mb and not session.jobs.running:
                await self._park(session, "grown")
                sizes[session] = 0.0
        for session in idle:
            if sum(sizes.values()) <= policy.memory_mb:
                break
            if sizes.get(session):
                await self._park(session, "memory")
                sizes[session] = 0.0
        self.over = sum(sizes.values()) > policy.memory_mb

    def _size(self, session: Session) -> float:
        pid = session.process.pid if session.process is not None else None
        return self._measure(pid) if pid is not None else 0.0

    async def _park(self, session: Session, why: str) -> None:
        if session.resident and session.turn is None:
            _log.info("session.parking", session_id=session.session_id, why=why, job=session.jobs.running)
            limit = f"it may go on for {self._policy.background_max:g} s after a turn (BACKGROUND_MAX)"
            await self._room.park(session, "the agent's memory was needed" if why == "memory" else limit)
