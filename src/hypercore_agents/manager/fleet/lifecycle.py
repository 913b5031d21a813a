"""An agent's states and the allowed transitions between them. Pure.

    pending ──▶ starting ──▶ running ──▶ draining ──▶ stopped
       └───────────┴────────────┴───────────┴───────▶ failed

An agent becomes `stopped` or `failed` only after its sandbox is confirmed to be gone. An agent that must end because of
a fault also goes through `draining`, with its error already recorded. If stopping its sandbox fails, the agent stays in
`draining`, visible and retried, and is never recorded as ended.

Rejected: flags beside the state ("stop pending", "is draining"). Two flags can already contradict each other.
"""

from collections.abc import Mapping

from hypercore_agents.api.agents import AgentState

TRANSITIONS: Mapping[AgentState, frozenset[AgentState]] = {
    AgentState.PENDING: frozenset({AgentState.STARTING, AgentState.DRAINING, AgentState.FAILED}),
    AgentState.STARTING: frozenset({AgentState.RUNNING, AgentState.DRAINING, AgentState.FAILED}),
    AgentState.RUNNING: frozenset({AgentState.DRAINING, AgentState.FAILED}),
    AgentState.DRAINING: frozenset({AgentState.STOPPED, AgentState.FAILED}),
    AgentState.STOPPED: frozenset(),
    AgentState.FAILED: frozenset(),
}

ENDED = frozenset(state for state, following in TRANSITIONS.items() if not following)
"""Final states. An agent in one of them has no sandbox."""


class IllegalTransition(RuntimeError):
    """A programming error: a change of state that the table does not allow."""


def check(before: AgentState, after: AgentState) -> None:
    """Raise IllegalTransition unless the table allows the change."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"an agent cannot go from {before.value} to {after.value}")
