"""Stores a failed agent's error in its row, and restores it.

The row holds `type: message`. It is readable as it is, and a request that waits for the agent, in any process, fails
with the status of that type.
"""

from hypercore_agents.api.errors import (
    AgentUnreachable,
    AtCapacity,
    DeadlineExceeded,
    HypercoreError,
    InternalError,
    InvalidRequest,
    Unavailable,
)

_LIMIT = 2000
_BY_TYPE: dict[str, type[HypercoreError]] = {
    error.type: error for error in (AgentUnreachable, AtCapacity, DeadlineExceeded, InvalidRequest, Unavailable)
}


def describe(error: HypercoreError) -> str:
    """Return the text that the row stores."""
    return f"{error.type}: {error.message}"[:_LIMIT]


def restore(text: str, agent_id: str) -> HypercoreError:
    """Return the error for a row's text, with the agent's id in its details."""
    kind, _, message = text.partition(": ")
    if kind in _BY_TYPE and message:
        return _BY_TYPE[kind](message, details={"agent_id": agent_id})
    return InternalError(f"the agent failed: {text}", details={"agent_id": agent_id})
