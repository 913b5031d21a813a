"""What every session of an agent is made with: who the agent is, where sessions live, what they may use.

Built once, in the server's composition root; nothing in it is about one session.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypercore_agents.agent.claude.approvals import Approvals
from hypercore_agents.agent.claude.readiness import StartReadiness
from hypercore_agents.agent.gateway.client import Gateway
from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.scheduling.start_limiter import StartLimiter
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.observability.metrics import AgentMetrics


@dataclass(frozen=True)
class AgentContext:
    """What every process of this agent is started with. `start_limiter` bounds the starts at a time."""

    agent_id: str
    isolation: Isolation
    cli: Path
    skills: Path
    configuration: AgentConfiguration
    start_timeout: float
    start_limiter: StartLimiter
    metrics: AgentMetrics
    approvals: Approvals
    gateway: Gateway
    tasks: Tasks
    workspace_bytes: int = 256 * 2**20
    workspace_files: int = 50_000
    readiness: StartReadiness = field(default_factory=StartReadiness)
    clock: Callable[[], float] = time.monotonic
