"""Unplaces sessions of the pool that have been idle for `PLACE_TTL`, which frees their places on agents.

The agent releases the session first, and only if everything of it is stored outside of the agent. Then the row is
changed, by one statement that requires the session to be idle and still placed there. A turn that begins in between
finds the session placed, and the agent restores it from the store. No agent is ever left with an outdated copy.
"""

import asyncio
from collections.abc import Callable

import structlog

from hypercore_agents.manager.sessions.reclaim import PlaceReclaimer
from hypercore_agents.store import placement
from hypercore_agents.store.database import Database
from hypercore_agents.store.sessions import SessionRow

_log = structlog.get_logger(__name__)
INTERVAL_SECONDS = 30.0
_BATCH = 100
_CONCURRENT = 8
_RELEASE_SECONDS = 10.0


class IdleSessions:
    """Unplaces idle sessions. `ttl` is in seconds, 0: never; `clock` returns Unix seconds."""

    def __init__(
        self,
        database: Database,
        reclaimer: PlaceReclaimer,
        *,
        ttl: float,
        leads: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._reclaimer = reclaimer
        self._ttl = ttl
        self._leads = leads
        self._clock = clock
        self._releasing = asyncio.Semaphore(_CONCURRENT)

    async def run_once(self) -> None:
        """Unplace sessions that have been idle for longer than `ttl`, if this process leads."""
        if not self._ttl or not self._leads():
            return
        now = self._clock()
        before = now - self._ttl
        async with self._database.read() as connection:
            idle = await placement.list_idle(connection, before=before, now=now, limit=_BATCH)
        unplaced = sum(await asyncio.gather(*(self._unplace(session, before) for session in idle)))
        if unplaced:
            _log.info("sessions.unplaced", count=unplaced)

    async def _unplace(self, session: SessionRow, before: float) -> bool:
        async with self._releasing:
            return await self._reclaimer.unplace(session, before, seconds=_RELEASE_SECONDS)
