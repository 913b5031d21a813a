"""What all sessions of one agent share: the agent's identity, its isolation, its limits and its services.

Built once, in the server's composition root. Nothing in it belongs to one session.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypercore_agents.agent.claude.approvals import Approvals
from hypercore_agents.agent.claude.readiness import StartReadiness
from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.scheduling.start_limiter import StartLimiter
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.observability.metrics import AgentMetrics


@dataclass(frozen=True)
class AgentContext:
    """Shared by every session of this agent and every CLI process that it starts.

    `cli` is the Claude CLI's path, `skills` the folder of the operator's skills. `start_timeout` is in seconds
    without progress. `workspace_bytes` and `workspace_files` limit a workspace archive.
    """

    agent_id: str
    isolation: Isolation
    cli: Path
    skills: Path
    configuration: AgentConfiguration
    start_timeout: float
    start_limiter: StartLimiter
    metrics: AgentMetrics
    approvals: Approvals
    gateway: GatewayClient
    tasks: Tasks
    workspace_bytes: int = 256 * 2**20
    workspace_files: int = 50_000
    readiness: StartReadiness = field(default_factory=StartReadiness)
    clock: Callable[[], float] = time.monotonic
