"""How a failed agent's error is kept in its row and told again as the error that it was.

The row holds `type: message`: readable as it is, and whoever waits for the agent, in whichever process, answers
with the status that belongs to the type.
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
    """Return the text for the row."""
    return f"{error.type}: {error.message}"[:_LIMIT]


def restore(text: str, agent_id: str) -> HypercoreError:
    """Return the error that a row's text stands for, naming the agent in its details."""
    kind, _, message = text.partition(": ")
    if kind in _BY_TYPE and message:
        return _BY_TYPE[kind](message, details={"agent_id": agent_id})
    return InternalError(f"the agent failed: {text}", details={"agent_id": agent_id})
