"""The one table of an agent's states and what may follow what. Pure.

    pending ──▶ starting ──▶ running ──▶ draining ──▶ stopped
       └───────────┴────────────┴───────────┴───────▶ failed

An agent goes to `stopped` or `failed` only after its sandbox is known to be gone. An agent that must end
for a fault goes through `draining` too, with its error already written down: a stop that does not succeed leaves
it there, seen and tried again, and never recorded as over.

Rejected: flags beside the state ("stop pending", "is draining"): two of them are enough to contradict each other.
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
"""States that an agent never leaves; it has no sandbox then."""


class IllegalTransition(RuntimeError):
    """A defect of ours: code asked for a change of state that the table does not have."""


def check(before: AgentState, after: AgentState) -> None:
    """Raise IllegalTransition unless the table has this change."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"an agent cannot go from {before.value} to {after.value}")
