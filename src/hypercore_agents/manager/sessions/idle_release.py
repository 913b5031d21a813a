"""Places are for sessions in use: one of the pool that is idle for `PLACE_TTL` gives its place back.

The agent is asked first. It lets go only of what is kept outside as a whole; then the row loses its place, in one
statement that requires the session to be idle and where it was. A turn that comes in between finds the session still
placed, and the agent brings it back from the store. So no agent is ever left with an outdated copy.
"""

import asyncio
from collections.abc import Callable

import structlog

from hypercore_agents.manager.sessions.reclaim import Places
from hypercore_agents.store import sessions
from hypercore_agents.store.database import Database
from hypercore_agents.store.sessions import SessionRow

_log = structlog.get_logger(__name__)
LOOK_SECONDS = 30.0
_AT_ONCE = 100
_ASKED_AT_ONCE = 8
_RELEASE_SECONDS = 10.0


class IdleSessions:
    """Takes idle sessions off their agents. `ttl` is in seconds, 0: never; `clock` returns Unix seconds."""

    def __init__(
        self,
        database: Database,
        places: Places,
        *,
        ttl: float,
        leads: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._places = places
        self._ttl = ttl
        self._leads = leads
        self._clock = clock
        self._asking = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def look(self) -> None:
        """Take sessions off their agents that were idle for too long, if this process leads."""
        if not self._ttl or not self._leads():
            return
        now = self._clock()
        before = now - self._ttl
        async with self._database.read() as connection:
            idle = await sessions.list_idle(connection, before=before, now=now, limit=_AT_ONCE)
        unplaced = sum(await asyncio.gather(*(self._unplace(session, before) for session in idle)))
        if unplaced:
            _log.info("sessions.unplaced", count=unplaced)

    async def _unplace(self, session: SessionRow, before: float) -> bool:
        async with self._asking:
            return await self._places.unplace(session, before, seconds=_RELEASE_SECONDS)
