"""Looks up running agents: address, bearer and defaults, as turns need them. Cached, because they never change.

A running agent's address, bearer, owner, options and timeout stay the same until it ends (a server that restarts is a
failed agent), so caching them is safe. Each turn's transaction checks that the agent is still running. This is the only
module that opens agents' bearers.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.errors import NotFound, Unavailable
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.security.sealing import Sealer
from hypercore_agents.store import agents
from hypercore_agents.store.agents import AgentRow
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.keys import agent_owner

_CACHED = 4096


@dataclass(frozen=True)
class Endpoint:
    """A running agent, as the relay needs it. `timeout`: seconds per turn."""

    agent_id: str
    user_id: str
    kind: AgentKind
    address: str
    timeout: float
    options: SessionOptions
    bearer: str = field(repr=False)


class AgentDirectory:
    """Finds running agents by id."""

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self._database = database
        self._sealer = sealer
        self._cache: OrderedDict[str, Endpoint] = OrderedDict()

    async def find(self, agent_id: str, connection: Connection | None = None) -> Endpoint:
        """Return an agent from the cache, or look it up. Use it only where the caller checks that the agent runs.

        Raises NotFound if the agent is unknown or has ended, Unavailable if it is not running.
        """
        cached = self._cache.get(agent_id)
        if cached is not None:
            return cached
        return await self.look_up(agent_id, connection)

    async def look_up(self, agent_id: str, connection: Connection | None = None) -> Endpoint:
        """Return an agent that is running now. Raises as `find` does.

        Another process may listen on a dead agent's port by now and must not receive the agent's bearer.
        """
        self.forget(agent_id)
        if connection is not None:
            return self._store(agent_id, await agents.get_agent(connection, agent_id))
        async with self._database.read() as fresh:
            return self._store(agent_id, await agents.get_agent(fresh, agent_id))

    def forget(self, agent_id: str) -> None:
        """Remove the agent from the cache."""
        self._cache.pop(agent_id, None)

    def _store(self, agent_id: str, row: AgentRow | None) -> Endpoint:
        if row is None or row.state in (AgentState.STOPPED, AgentState.FAILED):
            raise NotFound(f"there is no agent {agent_id}")
        if row.state is not AgentState.RUNNING or row.address is None or row.bearer_sealed is None:
            raise Unavailable(f"agent {agent_id} is {row.state.value}, not running", retry_after=2)
        endpoint = Endpoint(
            agent_id=row.agent_id,
            user_id=row.user_id,
            kind=row.kind,
            address=row.address,
            timeout=float(row.timeout_seconds),
            options=SessionOptions.stored(row.options),
            bearer=self._sealer.open(row.bearer_sealed, agent_owner(row.agent_id)),
        )
        self._cache[agent_id] = endpoint
        while len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        return endpoint
