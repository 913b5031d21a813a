"""Places are for sessions in use: one of the pool that is idle for `PLACE_TTL` gives its place back.

The agent is asked first. It lets go only of what is kept outside as a whole; then the row loses its place, in one
statement that requires the session to be idle and where it was. A turn that comes in between finds the session still
placed, and the agent brings it back from the store. So no agent is ever left with an outdated copy.
"""

import asyncio
from collections.abc import Callable

import structlog

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.directory import AgentDirectory
from hypercore_agents.store import sessions
from hypercore_agents.store.database import Database
from hypercore_agents.store.sessions import SessionRow

_log = structlog.get_logger(__name__)
LOOK_SECONDS = 30.0
_AT_ONCE = 100
_ASKED_AT_ONCE = 8


class IdleSessions:
    """Takes idle sessions off their agents. `ttl` is in seconds, 0: never; `clock` returns Unix seconds."""

    def __init__(
        self,
        database: Database,
        directory: AgentDirectory,
        client: AgentClient,
        *,
        ttl: float,
        leads: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._directory = directory
        self._client = client
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
        assert session.agent_id is not None
        async with self._asking:
            try:
                agent = await self._directory.look_up(session.agent_id)
                if not await self._client.release_session(agent.address, agent.bearer, session.session_id):
                    return False
                async with self._database.write_one() as connection:
                    return await sessions.unplace_idle(
                        connection, session.session_id, session.generation, before=before, now=self._clock()
                    )
            except HypercoreError as error:  # an agent that drains or is lost gives its sessions up by itself
                _log.debug("session.not_unplaced", session_id=session.session_id, error=error.message)
                return False
