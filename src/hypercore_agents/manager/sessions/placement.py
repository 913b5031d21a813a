"""Places sessions on agents, within the agents' places and each user's shares.

A new session is placed on the agent of the request, or on the agent of the pool with the fewest sessions. A session of
the pool whose agent drains or is lost is placed again by its next turn, with a higher generation; requests of its
previous agent for it are then rejected. A dedicated agent's sessions never move. If the pool has no free place, one is
reclaimed from an idle session (`reclaim.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.chat import ChatRequest
from hypercore_agents.api.errors import AtCapacity, HypercoreError, NotFound, RateLimited, Unavailable
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.manager.fleet import lifecycle
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.open_responses import most_places
from hypercore_agents.manager.sessions.options import freeze
from hypercore_agents.manager.sessions.reclaim import PlaceReclaimer
from hypercore_agents.store import agents, placement, sessions
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.placement import PLACEMENT
from hypercore_agents.store.session_lifecycle import SessionState
from hypercore_agents.store.sessions import SessionRow

_log = structlog.get_logger(__name__)

ATTEMPTS = 3
"""Attempts to place a session: another turn may take a place that was just reclaimed."""


@dataclass(frozen=True)
class OptionDefaults:
    """Options of new sessions that neither the request nor the agent sets: those of the pool, then the platform's."""

    pool: SessionOptions
    platform: SessionOptions


@dataclass(frozen=True)
class UserShares:
    """Limits of one user: a share of the pool's places (0 to 1), and a number of sessions (0: no limit)."""

    places: float = 1.0
    sessions: int = 0


class Placements:
    """Places sessions. `clock` returns Unix seconds."""

    def __init__(
        self,
        *,
        database: Database,
        directory: AgentDirectory,
        reclaimer: PlaceReclaimer,
        defaults: OptionDefaults,
        shares: UserShares,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._directory = directory
        self._reclaimer = reclaimer
        self._defaults = defaults
        self._shares = shares
        self._clock = clock

    async def requested_agent(self, agent_id: str, user_id: str) -> Endpoint:
        """Return the agent that a request names. Raises NotFound if it is another user's, and as the directory does."""
        endpoint = await self._directory.find(agent_id)
        if endpoint.kind is AgentKind.DEDICATED and endpoint.user_id != user_id:
            raise NotFound(f"there is no agent {agent_id}")
        return endpoint

    async def place_new(
        self, connection: Connection, request: ChatRequest, requested: Endpoint | None
    ) -> tuple[str, Endpoint] | None:
        """Place a new session, on the requested agent or in the pool, and freeze its options.

        Call it in a transaction with the lock PLACEMENT. Returns the session's id and its agent, or None if there is no
        free place. Raises RateLimited if the user has too many sessions.
        """
        await self._check_session_count(connection, request.user_id)
        defaults = self._defaults.pool if requested is None else requested.options
        session_id = new_session_id()
        agent_id = await placement.place_new(
            connection,
            session_id=session_id,
            user_id=request.user_id,
            options=self._frozen(request, defaults),
            now=self._clock(),
            agent_id=None if requested is None else requested.agent_id,
            share=self._shares.places,
        )
        if agent_id is None:
            return None
        endpoint = await self._directory.find(agent_id, connection)
        if endpoint.options != defaults and requested is None:  # a roll has changed this agent's options
            await sessions.set_options(connection, session_id, self._frozen(request, endpoint.options))
        return session_id, endpoint

    def _frozen(self, request: ChatRequest, defaults: SessionOptions) -> dict[str, object]:
        return freeze(request.options().with_defaults(defaults.with_defaults(self._defaults.platform)))

    async def _check_session_count(self, connection: Connection, user_id: str) -> None:
        most = self._shares.sessions
        if most and (held := await sessions.count_of_user(connection, user_id, most=most)) >= most:
            raise RateLimited(
                f"user {user_id} has {held} sessions, and the maximum is {most} (MAX_SESSIONS_PER_USER); "
                "delete some first",
                details={"share": "sessions", "used": held, "limit": most},
                retry_after=60,
            )

    async def place_again(self, session: SessionRow) -> bool:
        """Place a session of the pool that is not on a running agent. Returns False if that has changed meanwhile.

        Raises AtCapacity if no agent has a free place, RateLimited if the user holds too many places.
        """
        for _ in range(ATTEMPTS):
            async with self._database.write(exclusive=PLACEMENT) as connection:
                agent_id = await placement.place_again(
                    connection,
                    session.session_id,
                    now=self._clock(),
                    user_id=session.user_id,
                    share=self._shares.places,
                )
                current = await sessions.get_session(connection, session.session_id)
            if agent_id is not None:
                _log.info("session.moved", session_id=session.session_id, before=session.agent_id, agent_id=agent_id)
                return True
            if current is None or current.agent_id is not None or current.state == SessionState.ENDED:
                return False
            if not await self.reclaim_place(session.user_id):
                break
        raise await self.why_no_place(session.user_id)

    async def reclaim_place(self, user_id: str) -> bool:
        """Free a place of the pool for a user; return whether to try again."""
        async with self._database.read() as connection:
            held, places = await placement.count_places(connection, user_id)
        return await self._reclaimer.reclaim(user_id, own=self._most_places(places) <= held < places)

    def _most_places(self, places: int) -> int:
        return most_places(places, self._shares.places)

    async def why_no_place(self, user_id: str, agent_id: str | None = None) -> HypercoreError:
        """Return the error for a session that could not be placed, in the pool or on the given agent."""
        async with self._database.read() as connection:
            if agent_id is None:
                held, places = await placement.count_places(connection, user_id)
                if (most := self._most_places(places)) <= held < places:
                    return RateLimited(
                        f"user {user_id} holds {held} of the pool's {places} places, the most that one user may hold "
                        f"(PLACES_PER_USER={self._shares.places:g}), and all are in use; wait until a turn ends, or "
                        "delete a session",
                        details={"share": "places", "used": held, "limit": most},
                        retry_after=5,
                    )
                rows = await agents.list_agents(connection, kind=AgentKind.POOL)
            else:
                row = await agents.get_agent(connection, agent_id)
                rows = [row] if row is not None else []
            placed = await agents.sessions_per_agent(connection, [row.agent_id for row in rows])
        running = [row for row in rows if row.state is AgentState.RUNNING]
        if agent_id is not None and not running:
            self._directory.forget(agent_id)
            if not rows or rows[0].state in lifecycle.ENDED:
                return NotFound(f"there is no agent {agent_id}")
            return Unavailable(f"agent {agent_id} is not running", retry_after=2)
        numbers = {
            "agents_running": len(running),
            "agents_starting": sum(row.state in (AgentState.PENDING, AgentState.STARTING) for row in rows),
            "capacity": sum(row.capacity for row in running),
            "sessions": sum(placed.get(row.agent_id, 0) for row in running),
        }
        where = "the pool" if agent_id is None else f"agent {agent_id}"
        return AtCapacity(
            f"{where} has no free place for a session: {numbers['sessions']} of {numbers['capacity']} places are "
            f"taken, {numbers['agents_running']} agents are running and {numbers['agents_starting']} are starting",
            details=numbers,
            retry_after=2 if numbers["agents_starting"] else 10,
        )
