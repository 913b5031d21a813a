"""Tells the clients of running turns when their agent is not heard of, and ends the turns of a lost agent at once.

An agent that stops (a stopped virtual machine, for example) closes no connection, and its sandbox is removed only some
time after it was given up. Meanwhile a client would wait and not know why:

- An event stream whose agent's heartbeats are missing, and of which nothing comes, gets one `notice` event, and then
  keep-alive comments in place of the agent's, until something comes again.
- The turns of an agent that is silent and was given up (`fleet/health.py`) end at once with the error that says why.

Every manager process looks after the turns that it relays, with one query for all of them. Nothing is done for a chunk
that passes: how long a stream is silent is asked for the streams of silent agents only.
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
from hypercore_agents.store.heartbeats import UnheardAgent

_MISSED_BEATS = 2.2
"""Heartbeats after which an agent counts as silent here: two were missed. It is given up after 2.5 at the earliest."""
_AGENTS_AT_ONCE = 500


@dataclass(eq=False)
class _Relayed:
    control: RelayControl
    noticed: bool = False


class SilenceWatch:
    """The turns that this process relays, by agent. `interval`: HEALTH_CHECK_INTERVAL; `clock` returns Unix seconds."""

    def __init__(self, database: Database, *, interval: float, clock: Callable[[], float]) -> None:
        self._database = database
        self._silence = _MISSED_BEATS * heartbeat_seconds(interval)
        self._clock = clock
        self._turns: dict[str, set[_Relayed]] = {}
        self.look_seconds = heartbeat_seconds(interval) / 2

    @contextlib.contextmanager
    def watching(self, agent_id: str) -> Iterator[RelayControl]:
        """Look after a turn on an agent for the time of the block; relay it with the control."""
        turn = _Relayed(RelayControl())
        of_agent = self._turns.setdefault(agent_id, set())
        of_agent.add(turn)
        try:
            yield turn.control
        finally:
            of_agent.discard(turn)
            if not of_agent and self._turns.get(agent_id) is of_agent:
                del self._turns[agent_id]

    async def look(self) -> None:
        """Do once what is due now. A store that does not answer says nothing about agents."""
        agent_ids = [*self._turns]
        unheard: dict[str, UnheardAgent] = {}
        with contextlib.suppress(Unavailable):
            for first in range(0, len(agent_ids), _AGENTS_AT_ONCE):
                async with self._database.read() as connection:
                    found = await heartbeats.unheard_among(
                        connection, agent_ids[first : first + _AGENTS_AT_ONCE], since=self._clock() - self._silence
                    )
                unheard |= {agent.agent_id: agent for agent in found}
        for agent in unheard.values():
            for turn in [*self._turns.get(agent.agent_id, ())]:
                self._tell(turn, agent)

    def _tell(self, turn: _Relayed, agent: UnheardAgent) -> None:
        silent = turn.control.silent_seconds
        if silent is not None and silent < self._silence:
            turn.noticed = False
            return
        if agent.given_up is not None:
            reason = restore(agent.given_up, agent.agent_id).message
            turn.control.fail(AgentUnreachable(f"the agent was lost in mid-turn: {reason}"))
        elif turn.noticed:
            turn.control.send_frame(KEEPALIVE)
        else:
            quiet = max(0.0, self._clock() - agent.at)
            text = (
                f"the agent of this turn has not been heard of for {quiet:.0f} s; the turn goes on if it comes back, "
                "and ends with an error if the agent is lost"
            )
            turn.noticed = turn.control.send_frame(encode(Notice(text=text)))
