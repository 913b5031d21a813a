"""Parking: ends the CLIs of sessions that are idle for long, have grown large, or hold memory that the agent needs.

Each run checks the sessions without a turn. It parks those that are idle longer than `park_after`, then those whose
CLI has grown past `recycle_mb` (their next turn starts a new CLI), then, while all CLIs together use more private
memory than `memory_mb`, the least recently used one. A session with a turn is never parked, and a session that waits
for an approval has one.

A session with a background job is busy until `background_max` after its last turn; then it is parked, which ends the
job. When memory is short, it is parked last. When its job ends by itself, the session is idle from then on.

Parking for waiting turns is in `capacity.py`.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from hypercore_agents.agent.isolation.processes import private_memory_mb
from hypercore_agents.agent.sessions.capacity import LiveCapacity, SlotHolder

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ParkingLimits:
    """When idle sessions are parked.

    `park_after` and `background_max` are in seconds. `memory_mb` bounds the private memory of all CLIs together,
    `recycle_mb` that of one, in MB.
    """

    park_after: float
    memory_mb: int
    recycle_mb: int
    background_max: float = 600.0

    def interval(self) -> float:
        """Return the seconds between two runs."""
        return max(0.05, min(5.0, self.park_after / 4, self.background_max / 4))


class Parking:
    """Parks sessions that are past a limit. `measure` returns the private memory of a process, in MB."""

    def __init__(
        self,
        limits: ParkingLimits,
        sessions: Callable[[], Iterable[SlotHolder]],
        capacity: LiveCapacity,
        measure: Callable[[int], float] = private_memory_mb,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._sessions = sessions
        self._capacity = capacity
        self._measure = measure
        self._clock = clock
        self.memory_is_short = False

    async def run(self) -> None:
        """Park every session that is past a limit now."""
        limits = self._limits
        for session in [s for s in self._sessions() if s.status.holds_slot and s.turn is None and s.jobs.running]:
            await session.check_jobs()
        now = self._clock()
        idle = sorted(
            (s for s in self._sessions() if s.status.holds_slot and s.turn is None),
            key=lambda s: (s.jobs.running, s.used_at),
        )
        for session in idle:
            if now - session.used_at >= (limits.background_max if session.jobs.running else limits.park_after):
                await self._park(session, "idle")
        sizes = {s: self._size(s) for s in self._sessions() if s.status.holds_slot}
        for session in idle:
            if sizes.get(session, 0.0) > limits.recycle_mb and not session.jobs.running:
                await self._park(session, "grown")
                sizes[session] = 0.0
        for session in idle:
            if sum(sizes.values()) <= limits.memory_mb:
                break
            if sizes.get(session):
                await self._park(session, "memory")
                sizes[session] = 0.0
        self.memory_is_short = sum(sizes.values()) > limits.memory_mb

    def _size(self, session: SlotHolder) -> float:
        process = session.status.process
        pid = process.pid if process is not None else None
        return self._measure(pid) if pid is not None else 0.0

    async def _park(self, session: SlotHolder, cause: str) -> None:
        if session.status.holds_slot and session.turn is None:
            _log.info("session.parking", session_id=session.session_id, why=cause, job=session.jobs.running)
            time_is_up = f"they may run for {self._limits.background_max:g} s after a turn (BACKGROUND_MAX)"
            await self._capacity.park(session, "the agent's memory was needed" if cause == "memory" else time_is_up)
