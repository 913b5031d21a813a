"""Declares running agents lost, from the heartbeats that the gateway stores.

Agents send heartbeats; the manager does not poll them. Only an agent whose heartbeats are missing, or whose last one
says that it accepts no turns, is examined, so a thousand healthy agents cost one query. Missed heartbeats alone do not
fail an agent, because a gateway or a store that is down stops all heartbeats at once: while the gateway is not ready,
and for one period of missed heartbeats afterwards, no agent is declared lost.

An agent is lost as `silent` if its server does not respond either; as `not_ready` if it responds that it accepts no
turns (for example, because the gateway refuses its token); and as `cut_off` if it responds, its heartbeats stay missing
for another heartbeat's time, and other agents' heartbeats arrive meanwhile (otherwise the gateway's clock or network
path is at fault). All of it fits into `interval` (HEALTH_CHECK_INTERVAL): half of it is missed heartbeats, a fifth the
additional heartbeat, the rest sweeps and requests.

Rejected: polling each agent from the manager (the manager may reach agents that cannot reach the gateway, and learns
nothing about queues); trusting missed heartbeats alone (one restart of the gateway would replace the whole pool).
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
    """Return the seconds between heartbeats for a HEALTH_CHECK_INTERVAL."""
    return interval / 5


@dataclass(frozen=True)
class Loss:
    """Why an agent is lost. `reason` is a label of `hypercore_agent_lost_total`."""

    reason: str
    error: HypercoreError


class AgentHealth:
    """Examines running agents. `interval` is in seconds, `gateway_is_ready` checks the gateway, `clock` returns Unix
    seconds."""

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
        self._max_silence = interval / 2
        self._heartbeat = heartbeat_seconds(interval)
        self._probe = min(_LONGEST_PROBE, interval / 10)
        self._clock = clock
        self._excused_until = 0.0
        self._cut_off_at: dict[str, float] = {}

    async def suspicious(self) -> list[str]:
        """Return the running agents that `loss_of` should examine."""
        if (now := self._clock()) < self._excused_until:
            return []
        async with self._database.read() as connection:
            return await heartbeats.suspicious_agents(connection, since=now - self._max_silence)

    async def loss_of(self, row: AgentRow, address: str) -> Loss | None:
        """Return why a running agent is lost, or None if it is not."""
        async with self._database.read() as connection:
            beat = await heartbeats.get_heartbeat(connection, row.agent_id)
        if beat is not None and not beat.ready:
            return Loss("not_ready", Unavailable("the agent reports that it accepts no turns"))
        heard = max(row.running_at or 0.0, beat.at if beat is not None else 0.0)
        if self._clock() - heard < self._max_silence:
            self._cut_off_at.pop(row.agent_id, None)
            return None
        if not await self._gateway_is_ready():
            if self._clock() >= self._excused_until:
                _log.warning("agents.no_heartbeats", reason="no heartbeats: the gateway is not ready")
            self._excused_until = self._clock() + self._max_silence
            self._cut_off_at.clear()
            return None
        if self._clock() < self._excused_until:
            return None
        missing = f"the agent sent no heartbeat for {self._clock() - heard:.0f} s"
        if not await self._client.is_alive(address, seconds=self._probe):
            self._cut_off_at.pop(row.agent_id, None)
            return Loss("silent", AgentUnreachable(f"{missing} and does not respond"))
        if not await self._client.is_ready(address, seconds=self._probe):
            self._cut_off_at.pop(row.agent_id, None)
            return Loss("not_ready", Unavailable(f"{missing} and reports that it accepts no turns"))
        since = self._cut_off_at.setdefault(row.agent_id, self._clock())
        if self._clock() - since < self._heartbeat:
            return None
        async with self._database.read() as connection:
            witnessed = await heartbeats.has_witness(connection, row.agent_id, since=self._clock() - self._max_silence)
        if not witnessed:
            if self._clock() >= self._excused_until:
                _log.warning(
                    "agents.no_heartbeats",
                    reason="agents respond but none sends heartbeats: check the gateway's clock and network path",
                )
            self._excused_until = self._clock() + self._max_silence
            return None
        self._cut_off_at.pop(row.agent_id, None)
        return Loss("cut_off", Unavailable(f"{missing}: it responds, but does not reach the gateway"))

    def forget(self) -> None:
        """Discard the state in memory: another process leads now."""
        self._cut_off_at.clear()
