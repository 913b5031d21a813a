"""Unplaces idle sessions of the pool when another user needs a place.

Users with the most places lose theirs first.

A session of the pool is stored outside of its agent, so an idle one can be unplaced at any time; its next turn places
it again. One user's idle sessions therefore never keep another user out. As in `idle_release.py`, the agent releases
the session first, unless parts of it are only there. A session that was used within `FRESH_SECONDS` stays placed,
because its user may be about to continue.

Rejected: a fixed share of the pool per user (most users would leave most of theirs unused).
"""

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.directory import AgentDirectory
from hypercore_agents.store import placement
from hypercore_agents.store.database import Database
from hypercore_agents.store.sessions import SessionRow

_log = structlog.get_logger(__name__)
FRESH_SECONDS = 0.5
_CANDIDATES = 16
_RELEASE_SECONDS = 5.0
_SEARCH_SECONDS = 10.0


class PlaceReclaimer:
    """Unplaces idle sessions. `clock` returns Unix seconds."""

    def __init__(
        self, database: Database, directory: AgentDirectory, client: AgentClient, *, clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._directory = directory
        self._client = client
        self._clock = clock
        self._releasing: set[str] = set()

    async def reclaim(self, user_id: str, *, own: bool) -> bool:
        """Free a place for a user; `own`: only one of the user's own. Returns whether a place was freed."""
        now = self._clock()
        before = now - FRESH_SECONDS
        async with self._database.read() as connection:
            idle = await placement.list_reclaimable(
                connection, before=before, now=now, limit=_CANDIDATES, user_id=user_id if own else None
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SEARCH_SECONDS):
                for session in idle:
                    if session.session_id in self._releasing:  # for another turn
                        continue
                    self._releasing.add(session.session_id)
                    try:
                        freed = await self.unplace(session, before)
                    finally:
                        self._releasing.discard(session.session_id)
                    if freed:
                        _log.info("place.reclaimed", session_id=session.session_id, by_user=user_id)
                        return True
        return False

    async def unplace(self, session: SessionRow, before: float, *, seconds: float = _RELEASE_SECONDS) -> bool:
        """Unplace a session if its agent releases it and it has been idle since a time; return whether it did."""
        assert session.agent_id is not None
        try:
            agent = await self._directory.look_up(session.agent_id)
            if not await self._client.release_session(agent.address, agent.bearer, session.session_id, seconds=seconds):
                return False
            async with self._database.write_one() as connection:
                return await placement.unplace_idle(
                    connection, session.session_id, session.generation, before=before, now=self._clock()
                )
        except HypercoreError as error:  # the sessions of an agent that drains or is lost are unplaced with it
            _log.debug("session.not_unplaced", session_id=session.session_id, error=error.message)
            return False
