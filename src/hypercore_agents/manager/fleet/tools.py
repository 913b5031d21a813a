"""Decides whether sessions on an agent may use tools: only where a tool can affect no other user. Pure.

A tool runs with its session's rights. On an agent that several users share, sessions must therefore be isolated from
one another; on a dedicated agent it is enough that the agent is isolated from the host and from other agents. This
includes the network: while authentication is off, a tool that reaches the manager's port can act for any user.
"""

from hypercore_agents.api.agents import AgentKind
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.compute.base import Capabilities


def configuration(
    kind: AgentKind, capacity: int, capabilities: Capabilities, *, allow_unisolated: bool
) -> AgentConfiguration:
    """Return the configuration that an agent of this kind receives at enrolment, with the reason if tools are off."""
    reason = None
    if not allow_unisolated:
        if not capabilities.separates_agents or not capabilities.separates_network:
            reason = (
                f"this agent is not isolated from its host ({capabilities.isolation}); use a backend that isolates it, "
                "or set ALLOW_UNISOLATED_TOOLS=1 on the manager"
            )
        elif kind is AgentKind.POOL and not capabilities.separates_sessions:
            reason = (
                "agents of the pool serve several users and this backend does not isolate sessions from one another; "
                "spawn a dedicated agent, or set ALLOW_UNISOLATED_TOOLS=1 on the manager"
            )
    return AgentConfiguration(
        max_concurrent=capacity,
        tools=reason is None,
        tools_reason=reason,
        # The launcher provides the isolation that the backend promises; only the agent can detect that it has none.
        needs_separation=capabilities.separates_sessions and not allow_unisolated,
        sessions_move=kind is AgentKind.POOL,
    )
