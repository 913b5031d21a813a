"""The leader's changes of agents' rows: fenced, checked against the table of transitions, signalled to waiting tasks.

A change names the state that it starts from. A concurrent write to the row (the gateway stores a bearer, a user
requests a deletion) does not affect a change that is still legal, and voids one that is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet import lifecycle
from hypercore_agents.manager.fleet.leadership import Leadership
from hypercore_agents.security.bearers import digest
from hypercore_agents.store import agents, enrolments, keys, placement, sessions
from hypercore_agents.store.agents import AgentRow
from hypercore_agents.store.database import Connection, Database

_log = structlog.get_logger(__name__)
_TRIES = 5


class RowContended(Exception):
    """The row was changed concurrently during each of several attempts; try again later."""


@dataclass(frozen=True)
class _Enrolment:
    secret_digest: str
    seconds: float
    configuration: AgentConfiguration


class AgentRows:
    """Changes agents' rows on behalf of the leader. `clock` returns Unix seconds."""

    def __init__(
        self, database: Database, leadership: Leadership, changes: ChangeSignals, clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._leadership = leadership
        self._changes = changes
        self._clock = clock

    async def get(self, agent_id: str) -> AgentRow | None:
        """Return the agent, whatever its state."""
        async with self._database.read() as connection:
            return await agents.get_agent(connection, agent_id)

    async def move(self, row: AgentRow, after: AgentState, **values: Any) -> AgentRow | None:
        """Move an agent from `row.state` to another state. Returns None if it has left `row.state`."""
        return await self._change(row, after, values)

    async def begin_start(
        self, row: AgentRow, secret: str, configuration: AgentConfiguration, *, seconds: float
    ) -> AgentRow | None:
        """Record that a start is about to be attempted, with its one enrolment, which is valid for `seconds`."""
        after = AgentState.STARTING if row.state is AgentState.PENDING else None
        return await self._change(
            row,
            after,
            {"attempts": row.attempts + 1, "address": None},
            enrolment=_Enrolment(digest(secret), seconds, configuration),
        )

    async def set_address(self, row: AgentRow, address: str) -> AgentRow | None:
        """Record the address of the agent's server."""
        return await self._change(row, None, {"address": address})

    async def end(self, row: AgentRow, after: AgentState) -> AgentRow | None:
        """Record that the sandbox is gone. This ends the agent, and a dedicated agent's sessions and API key."""
        return await self._change(row, after, {"ended_at": self._clock(), "address": None, "bearer_sealed": None})

    async def _change(
        self,
        row: AgentRow,
        after: AgentState | None,
        values: dict[str, Any],
        *,
        enrolment: _Enrolment | None = None,
    ) -> AgentRow | None:
        if after is not None:
            lifecycle.check(row.state, after)
            values = {**values, "state": after}
        for _ in range(_TRIES):
            async with self._database.write() as connection:
                await self._leadership.guard(connection)
                current = await agents.get_agent(connection, row.agent_id)
                if current is None or current.state is not row.state:
                    return None
                now = self._clock()
                if not await agents.change_agent(connection, row.agent_id, current.version, now=now, **values):
                    continue
                if enrolment is not None:
                    await enrolments.add_enrolment(
                        connection,
                        secret_digest=enrolment.secret_digest,
                        agent_id=row.agent_id,
                        now=now,
                        expires_at=now + enrolment.seconds,
                        configuration=enrolment.configuration.model_dump(),
                    )
                if after in lifecycle.ENDED:
                    await self._release(connection, row.agent_id, now)
                changed = await agents.get_agent(connection, row.agent_id)
            self._changes.notify(row.agent_id)
            return changed
        raise RowContended(row.agent_id)

    async def _release(self, connection: Connection, agent_id: str, now: float) -> None:
        unplaced = await placement.unplace_sessions_of(connection, agent_id)
        if unplaced:
            _log.info("agent.sessions_unplaced", agent_id=agent_id, sessions=unplaced)
        await sessions.end_sessions_of(connection, agent_id, now=now)
        await keys.delete_key(connection, keys.agent_owner(agent_id))
