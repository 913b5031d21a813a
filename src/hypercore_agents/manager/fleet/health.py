"""Whether a running agent is well, by what it tells: its heartbeats, as the gateway stored them.

Agents tell; the manager does not poll them. Only an agent that fell silent, or said that it takes no turns, is looked
at, so a thousand agents that are well cost one query. Silence alone condemns nobody, since a gateway or a store that
is down silences all at once: while the gateway is not ready, and for one spell of silence after, nobody is judged.

An agent is judged `silent` when its server does not answer either, `not_ready` when it answers that it takes no turns
(the gateway refuses its token, for example), and `cut_off` when it answers, its silence went on for another heartbeat,
and others were heard meanwhile (else it is the gateway's clock or path, and not the agents' fault). All of it fits
into `interval` (HEALTH_CHECK_INTERVAL), as tests show: half of it is silence, a fifth a heartbeat, the rest sweeps and
calls.

Rejected: the manager asking each agent in turn (it reaches agents where the gateway may not be reached from, and
learns nothing of queues); trusting silence alone (one restart of the gateway would replace the whole pool).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from hypercore_agents.api.errors import AgentUnreachable, HypercoreError, Unavailable
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.store import heartbeats
from hypercore_agents.store.agents import AgentRow
from hypercore_agents.store.database import Database

_log = structlog.get_logger(__name__)
_LONGEST_PROBE = 5.0


def heartbeat_seconds(interval: float) -> float:
    """Return the pause between heartbeats for a HEALTH_CHECK_INTERVAL."""
    return interval / 5


@dataclass(frozen=True)
class Loss:
    """Why an agent is given up. `reason` is a label of `hypercore_agent_lost_total`."""

    reason: str
    error: HypercoreError


class AgentHealth:
    """Judges running agents. `interval` in seconds; `gateway_is_ready` asks the gateway; `clock`: Unix seconds."""

    def __init__(
        self,
        database: Database,
        client: AgentClient,
        gateway_is_ready: Callable[[], Awaitable[bool]],
        *,
        interval: float,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._client = client
        self._gateway_is_ready = gateway_is_ready
        self._silence = interval / 2
        self._beat = heartbeat_seconds(interval)
        self._probe = min(_LONGEST_PROBE, interval / 10)
        self._clock = clock
        self._excused_until = 0.0
        self._cut_off_at: dict[str, float] = {}

    async def suspicious(self) -> list[str]:
        """Return the running agents that `judge` should look at."""
        if (now := self._clock()) < self._excused_until:
            return []
        async with self._database.read() as connection:
            return await heartbeats.suspicious_agents(connection, since=now - self._silence)

    async def judge(self, row: AgentRow, address: str) -> Loss | None:
        """Return why a running agent must be given up, or None while there is no reason."""
        async with self._database.read() as connection:
            beat = await heartbeats.get_heartbeat(connection, row.agent_id)
        if beat is not None and not beat.ready:
            return Loss("not_ready", Unavailable("the agent says that it takes no turns"))
        heard = max(row.running_at or 0.0, beat.at if beat is not None else 0.0)
        if self._clock() - heard < self._silence:
            self._cut_off_at.pop(row.agent_id, None)
            return None
        if not await self._gateway_is_ready():
            if self._clock() >= self._excused_until:
                _log.warning("agents.unheard", reason="the gateway is not ready")
            self._excused_until = self._clock() + self._silence
            self._cut_off_at.clear()
            return None
        if self._clock() < self._excused_until:
            return None
        quiet = f"the agent was silent for {self._clock() - heard:.0f} s"
        if not await self._client.is_alive(address, seconds=self._probe):
            self._cut_off_at.pop(row.agent_id, None)
            return Loss("silent", AgentUnreachable(f"{quiet} and does not answer"))
        if not await self._client.is_ready(address, seconds=self._probe):
            self._cut_off_at.pop(row.agent_id, None)
            return Loss("not_ready", Unavailable(f"{quiet} and says that it takes no turns"))
        since = self._cut_off_at.setdefault(row.agent_id, self._clock())
        if self._clock() - since < self._beat:
            return None
        async with self._database.read() as connection:
            witnessed = await heartbeats.has_witness(connection, row.agent_id, since=self._clock() - self._silence)
        if not witnessed:
            if self._clock() >= self._excused_until:
                _log.warning("agents.unheard", reason="all are silent and answer: is the gateway's clock right?")
            self._excused_until = self._clock() + self._silence
            return None
        self._cut_off_at.pop(row.agent_id, None)
        return Loss("cut_off", Unavailable(f"{quiet}: it answers, and does not reach the gateway"))

    def forget(self) -> None:
        """Drop what was remembered: somebody else leads now."""
        self._cut_off_at.clear()
