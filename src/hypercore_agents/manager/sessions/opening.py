"""Opens sessions for requests that are not turns, such as those for files: places them and restores their workspace."""

from collections.abc import Callable
from dataclasses import dataclass

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.chat import SessionOpening
from hypercore_agents.api.errors import AgentUnreachable, Unavailable
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.sessions.access import SessionAccess, find_session
from hypercore_agents.manager.sessions.placement import ATTEMPTS, Placements
from hypercore_agents.manager.sessions.reclaim import FRESH_SECONDS
from hypercore_agents.manager.sessions.turns import placement_of
from hypercore_agents.store import agents, leases, sessions
from hypercore_agents.store.database import Database

_TOUCH_SECONDS = FRESH_SECONDS / 2
"""Minimum time between two records of a session's use, which keep it placed."""


@dataclass(frozen=True)
class OpenSession:
    """A session that its agent has opened."""

    user_id: str
    endpoint: Endpoint


class SessionOpener:
    """Opens sessions on their agents. `wake` queues a step of the reconciler; `clock` returns Unix seconds."""

    def __init__(
        self,
        *,
        database: Database,
        directory: AgentDirectory,
        placements: Placements,
        client: AgentClient,
        wake: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._directory = directory
        self._placements = placements
        self._client = client
        self._wake = wake
        self._clock = clock

    async def open(self, session_id: str, access: SessionAccess) -> OpenSession:
        """Open a session on its agent; one that is not on a running agent is placed first, as by a turn.

        Raises NotFound, AtCapacity if there is no free place, Unavailable if its agent is not running and the session
        cannot move, and the agent's own error.
        """
        for _ in range(ATTEMPTS):
            async with self._database.read() as connection:
                row = await find_session(connection, session_id, access)
                agent = await agents.get_agent(connection, row.agent_id) if row.agent_id is not None else None
                holder = row.turn_holder
                turn_runs = holder is not None and await leases.holder_lives(connection, holder, now=self._clock())
            if agent is None or agent.state is not AgentState.RUNNING:
                if row.kind is AgentKind.POOL:
                    await self._placements.place_again(row)
                continue
            endpoint = await self._directory.look_up(agent.agent_id)
            if self._clock() - row.last_used_at > _TOUCH_SECONDS:
                async with self._database.write_one() as connection:
                    await sessions.touch(connection, session_id, now=self._clock())
            if not turn_runs:  # the agent of a running turn has the session open already
                opening = SessionOpening(user_id=row.user_id, placement=placement_of(endpoint, row, row.turn + 1))
                await self._open(endpoint, opening)
            return OpenSession(row.user_id, endpoint)
        raise Unavailable(f"the agent of session {session_id} is not running", retry_after=2)

    async def _open(self, endpoint: Endpoint, opening: SessionOpening) -> None:
        try:
            await self._client.open_session(endpoint.address, endpoint.bearer, opening)
        except AgentUnreachable:
            self._directory.forget(endpoint.agent_id)
            self._wake(endpoint.agent_id)
            raise
