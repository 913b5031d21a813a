"""The agent's heartbeat: periodic requests to the gateway that report the agent's load and readiness.

The agent sends and is not polled: this works wherever the agent can reach models, and a missing heartbeat is itself a
signal. A failed heartbeat is not repeated; the next one carries newer values. The values are in `/metrics` too.
"""

from collections.abc import Callable

import structlog

from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.agent.isolation.processes import private_memory_mb
from hypercore_agents.agent.scheduling.load import CpuMeter
from hypercore_agents.agent.sessions.registry import Sessions
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.internal import Heartbeat
from hypercore_agents.observability.metrics import AgentMetrics

_log = structlog.get_logger(__name__)


class HeartbeatLoop:
    """Sends heartbeats. `memory_mb` is the agent's limit; `not_ready` returns why it accepts no turns, or None."""

    def __init__(
        self,
        gateway: GatewayClient,
        sessions: Sessions,
        metrics: AgentMetrics,
        memory_mb: int,
        cores: int,
        not_ready: Callable[[], str | None],
    ) -> None:
        self._gateway = gateway
        self._sessions = sessions
        self._metrics = metrics
        self._memory_mb = memory_mb
        self._cpu = CpuMeter(cores)
        self._not_ready = not_ready

    async def beat(self) -> None:
        """Measure, and send one heartbeat. Raises nothing: the manager notices missing heartbeats."""
        try:
            await self._gateway.heartbeat(self.measure())
        except HypercoreError as error:
            self._metrics.heartbeats.labels("failed").inc()
            _log.warning("heartbeat.failed", error=error.message)
        else:
            self._metrics.heartbeats.labels("ok").inc()

    def measure(self) -> Heartbeat:
        """Return the agent's current load and readiness."""
        placed, live, running = self._sessions.counts()
        memory = round(self._sessions.memory_mb() + private_memory_mb("self"))
        cpu = self._cpu.share(self._sessions.pids())
        if cpu is not None:
            self._metrics.cpu.set(cpu)
        self._metrics.memory.set(memory / self._memory_mb)
        return Heartbeat(
            ready=self._not_ready() is None,
            sessions=placed,
            live=live,
            running=running,
            waiting=self._sessions.capacity.waiting,
            memory_mb=memory,
            memory_limit_mb=self._memory_mb,
            cpu=cpu,
            queue_wait_seconds=self._sessions.waits.percentile(),
            start_wait_seconds=self._sessions.start_limiter.waits.percentile(),
        )
