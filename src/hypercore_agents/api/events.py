"""The events of a streamed turn, as server-sent events.

Every frame has an `event:` line, a JSON `data:` line and an `id:` of the form `generation.sequence`.
In order: one `session`; then any number of `delta`, `tool_use`, `tool_result` and `reset`; then exactly one
`result` or `error`, which is the last. A comment line comes every 15 s while nothing else does.
`reset` says that the model's stream was cut and starts again: drop the deltas since the last
`tool_use`, `tool_result` or `session`. `approval_request` says that a tool call waits for the user
(`POST /v1/agent/session/{id}/approvals/{approval_id}`), `approval_resolved` how that ended.
"""

from typing import Any, Literal, get_args

from pydantic import BaseModel

from hypercore_agents.api.approvals import ApprovalRequest, ApprovalResolved
from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.api.errors import ErrorBody

EventName = Literal[
    "session",
    "delta",
    "tool_use",
    "tool_result",
    "approval_request",
    "approval_resolved",
    "reset",
    "result",
    "error",
]
EVENT_NAMES: tuple[str, ...] = get_args(EventName)
KEEPALIVE = b": keepalive\n\n"
KEEPALIVE_SECONDS = 15.0


class SessionStarted(BaseModel):
    """Data of `session`: the turn has begun."""

    session_id: str
    agent_id: str
    turn: int
    tools: bool
    notices: list[str]


class Delta(BaseModel):
    """Data of `delta`: the next piece of the answer's text."""

    text: str


class ToolUse(BaseModel):
    """Data of `tool_use`: the model calls a tool."""

    tool_use_id: str
    name: str
    input: dict[str, Any]


class ToolResult(BaseModel):
    """Data of `tool_result`: what the tool answered, as text, cut at 100,000 characters."""

    tool_use_id: str
    content: str
    is_error: bool


class Reset(BaseModel):
    """Data of `reset`: deltas since the last tool event are void."""

    reason: str


EventData = (
    SessionStarted
    | Delta
    | ToolUse
    | ToolResult
    | ApprovalRequest
    | ApprovalResolved
    | Reset
    | ChatResponse
    | ErrorBody
)

_NAMES: dict[type[BaseModel], EventName] = {
    SessionStarted: "session",
    Delta: "delta",
    ToolUse: "tool_use",
    ToolResult: "tool_result",
    ApprovalRequest: "approval_request",
    ApprovalResolved: "approval_resolved",
    Reset: "reset",
    ChatResponse: "result",
    ErrorBody: "error",
}


def event_name(data: EventData) -> EventName:
    """Return the name under which this data travels."""
    return _NAMES[type(data)]


def encode(data: EventData, event_id: str | None = None) -> bytes:
    """Return one server-sent-event frame (WHATWG HTML §9.2.6); JSON never contains a raw line break."""
    identity = f"id: {event_id}\n" if event_id else ""
    return f"{identity}event: {event_name(data)}\ndata: {data.model_dump_json(exclude_none=True)}\n\n".encode()


def decode(name: str, data: bytes) -> EventData | None:
    """Return the data of one frame as its model; None for a name that this version does not know.

    Raises pydantic.ValidationError for data that does not fit its name.
    """
    model = _MODELS.get(name)
    return None if model is None else model.model_validate_json(data)  # type: ignore[return-value]


_MODELS: dict[str, type[BaseModel]] = {name: model for model, name in _NAMES.items()}
