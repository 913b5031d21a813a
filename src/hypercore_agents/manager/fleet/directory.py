"""What a turn must know about its agent: where it is, its bearer, its defaults. Remembered, since it never changes.

A running agent's address, bearer, owner, options and timeout stay the same until it ends (a server that
restarts is a failed agent), so remembering them is safe; whether the agent still runs is asked in each turn's own
transaction. Bearers are opened here and nowhere else.
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

_REMEMBERED = 4096


@dataclass(frozen=True)
class Endpoint:
    """A running agent, as the relay needs it. `timeout` in seconds per turn."""

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
        self._known: OrderedDict[str, Endpoint] = OrderedDict()

    async def find(self, agent_id: str, connection: Connection | None = None) -> Endpoint:
        """Return an agent that runs, or ran when it was last looked up; call it where the state is guarded.

        Raises NotFound for one that is unknown or over, Unavailable for one that does not run.
        """
        known = self._known.get(agent_id)
        if known is not None:
            return known
        return await self.look_up(agent_id, connection)

    async def look_up(self, agent_id: str, connection: Connection | None = None) -> Endpoint:
        """Return an agent that runs now. Raises as `find` does.

        A dead agent's port may be somebody else's by now, who must not be shown its bearer.
        """
        self.forget(agent_id)
        if connection is not None:
            return self._remember(agent_id, await agents.get_agent(connection, agent_id))
        async with self._database.read() as fresh:
            return self._remember(agent_id, await agents.get_agent(fresh, agent_id))

    def forget(self, agent_id: str) -> None:
        """Look the agent up anew the next time."""
        self._known.pop(agent_id, None)

    def _remember(self, agent_id: str, row: AgentRow | None) -> Endpoint:
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
        self._known[agent_id] = endpoint
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return endpoint
