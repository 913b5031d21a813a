"""Informs the clients of running turns when their agent's heartbeats are missing, and ends the turns of a lost agent.

An agent that stops (for example, a paused virtual machine) closes no connection, and its sandbox is removed only some
time after the agent was declared lost. Clients would wait meanwhile without knowing why:

- An event stream that is idle while its agent's heartbeats are missing receives one `notice` event, and then keep-alive
  comments in place of the agent's, until the agent sends something again.
- The turns of an agent that was declared lost (`fleet/health.py`) end at once, with the error that says why.

Every manager process does this for the turns that it relays, by one query for all of them. Relaying a chunk costs
nothing: only the streams of agents with missing heartbeats are examined.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hypercore_agents.api.errors import AgentUnreachable, Unavailable
from hypercore_agents.api.events import KEEPALIVE, Notice, encode
from hypercore_agents.kit.relay.relay_control import RelayControl
from hypercore_agents.manager.fleet.failures import restore
from hypercore_agents.manager.fleet.health import heartbeat_seconds
from hypercore_agents.store import heartbeats
from hypercore_agents.store.database import Database
from hypercore_agents.store.heartbeats import OverdueAgent

_MISSED_HEARTBEATS = 2.2
"""Heartbeats without which clients are informed: two were missed. An agent is declared lost after 2.5 at the
earliest."""
_AGENTS_PER_QUERY = 500


@dataclass(eq=False)
class _RelayedTurn:
    control: RelayControl
    informed: bool = False


class MissedHeartbeats:
    """The turns that this process relays, by agent. `interval`: HEALTH_CHECK_INTERVAL; `clock` returns Unix seconds."""

    def __init__(self, database: Database, *, interval: float, clock: Callable[[], float]) -> None:
        self._database = database
        self._max_silence = _MISSED_HEARTBEATS * heartbeat_seconds(interval)
        self._clock = clock
        self._turns: dict[str, set[_RelayedTurn]] = {}
        self.interval_seconds = heartbeat_seconds(interval) / 2

    @contextlib.contextmanager
    def watching(self, agent_id: str) -> Iterator[RelayControl]:
        """Watch a turn on an agent until the block ends. Relay the turn with the returned control."""
        turn = _RelayedTurn(RelayControl())
        of_agent = self._turns.setdefault(agent_id, set())
        of_agent.add(turn)
        try:
            yield turn.control
        finally:
            of_agent.discard(turn)
            if not of_agent and self._turns.get(agent_id) is of_agent:
                del self._turns[agent_id]

    async def run_once(self) -> None:
        """Inform clients and end turns as due. Does nothing while the store is unavailable."""
        agent_ids = [*self._turns]
        overdue: dict[str, OverdueAgent] = {}
        since = self._clock() - self._max_silence
        with contextlib.suppress(Unavailable):
            for first in range(0, len(agent_ids), _AGENTS_PER_QUERY):
                async with self._database.read() as connection:
                    some = agent_ids[first : first + _AGENTS_PER_QUERY]
                    found = await heartbeats.overdue_among(connection, some, since=since)
                overdue |= {agent.agent_id: agent for agent in found}
        for agent in overdue.values():
            for turn in [*self._turns.get(agent.agent_id, ())]:
                self._inform(turn, agent)

    def _inform(self, turn: _RelayedTurn, agent: OverdueAgent) -> None:
        silent = turn.control.silent_seconds
        if silent is not None and silent < self._max_silence:
            turn.informed = False
            return
        if agent.given_up is not None:
            reason = restore(agent.given_up, agent.agent_id).message
            turn.control.fail(AgentUnreachable(f"the agent was lost during the turn: {reason}"))
        elif turn.informed:
            turn.control.send_frame(KEEPALIVE)
        else:
            missing = max(0.0, self._clock() - agent.at)
            text = (
                f"the agent of this turn has sent no heartbeat for {missing:.0f} s; the turn continues if the agent "
                "recovers, and ends with an error if it is lost"
            )
            turn.informed = turn.control.send_frame(encode(Notice(text=text)))
