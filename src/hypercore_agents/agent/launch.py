"""What every session of an agent is made with: who the agent is, where sessions live, what they may use.

Built once, in the server's composition root; nothing in it is about one session.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypercore_agents.agent.approvals import Approvals
from hypercore_agents.agent.connects import Connects
from hypercore_agents.agent.gateway import Gateway
from hypercore_agents.agent.quarters import Quarters
from hypercore_agents.agent.readiness import StartReadiness
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.kit.tasks import Tasks
from hypercore_agents.observability.metrics import AgentMetrics


@dataclass(frozen=True)
class Launch:
    """What every process of this agent is started with. `connects` bounds the starts at a time."""

    agent_id: str
    quarters: Quarters
    cli: Path
    skills: Path
    configuration: AgentConfiguration
    start_timeout: float
    connects: Connects
    metrics: AgentMetrics
    approvals: Approvals
    gateway: Gateway
    tasks: Tasks
    workspace_bytes: int = 256 * 2**20
    workspace_files: int = 50_000
    readiness: StartReadiness = field(default_factory=StartReadiness)
    clock: Callable[[], float] = time.monotonic
