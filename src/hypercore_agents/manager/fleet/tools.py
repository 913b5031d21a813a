"""Whether sessions on an agent may use tools: only where a tool reaches nobody but its own user. Pure.

A tool runs as its session does. So on an agent that several users share, sessions must be kept apart from one
another; on one user's own agent it is enough that the agent is kept apart from the host and from other agents. On the
network too: a tool that reaches the manager's port is anybody there, as long as authentication is off.
"""

from hypercore_agents.api.agents import AgentKind
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.compute.base import Capabilities


def configuration(
    kind: AgentKind, capacity: int, capabilities: Capabilities, *, allow_unisolated: bool
) -> AgentConfiguration:
    """Return what an agent of this kind is told about itself, with the reason why tools are off when they are."""
    reason = None
    if not allow_unisolated:
        if not capabilities.separates_agents or not capabilities.separates_network:
            reason = (
                f"this agent is not kept apart from its host ({capabilities.isolation}); use a backend that does, "
                "or set ALLOW_UNISOLATED_TOOLS=1 on the manager"
            )
        elif kind is AgentKind.POOL and not capabilities.separates_sessions:
            reason = (
                "agents of the pool serve several users and this backend does not keep sessions apart; "
                "spawn an agent of your own, or set ALLOW_UNISOLATED_TOOLS=1 on the manager"
            )
    return AgentConfiguration(
        max_concurrent=capacity,
        tools=reason is None,
        tools_reason=reason,
        # What the backend promises is the launcher's work, and only the agent sees whether it has one.
        needs_separation=capabilities.separates_sessions and not allow_unisolated,
        sessions_move=kind is AgentKind.POOL,
    )
