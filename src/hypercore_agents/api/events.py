"""The events of a streamed turn, as server-sent events.

Every frame has an `event:` line, a JSON `data:` line and an `id:` of the form `generation.sequence`. The order is: one
`session` event (a second one if the turn moved to another agent before it began; the last one is valid), then any
number of `delta`, `tool_use`, `tool_result` and `reset`, then exactly one `result` or `error`, which ends the stream.
A comment line is sent after every 15 s without an event.

- `reset`: the model's stream was cut off and starts again. Discard the deltas since the last `tool_use`, `tool_result`
  or `session`.
- `approval_request`: a tool call waits for the user (`POST /v1/agent/session/{id}/approvals/{approval_id}`);
  `approval_resolved` reports how it ended.
- `text`: a whole piece of the answer's text, as stored in the session's event log. It replaces deltas and has the id of
  the last one. Only a resumed stream contains it.
- `notice`: between turns, something that concerns the session, such as the end of a background process. In a turn's
  stream, without an `id`, it reports missing heartbeats of the agent; the turn continues, or ends with `error` if the
  agent is lost.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field

from hypercore_agents.api.approvals import ApprovalRequest, ApprovalResolved
from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.api.errors import ErrorBody

EventName = Literal[
    "session",
    "delta",
    "text",
    "tool_use",
    "tool_result",
    "approval_request",
    "approval_resolved",
    "reset",
    "notice",
    "result",
    "error",
]
EVENT_NAMES: tuple[str, ...] = get_args(EventName)
LOST_DURING_TURN = "the agent was lost during the turn; if the turn ended, the history has its result"
QUIET: tuple[EventName, ...] = ("result", "error", "notice")
"""Events after which no turn is running."""
EVENT_ID_PATTERN = r"^[1-9][0-9]{0,9}\.[0-9]{1,10}$"
EventId = tuple[int, int]
"""Generation of the session's placement and sequence within it; as tuples, ids increase in the order of events."""
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


class TextBlock(BaseModel):
    """Data of `text`: the answer's whole text between two other events."""

    text: str
    truncated: bool = Field(default=False, description="whether the log has only the beginning")


class ToolUse(BaseModel):
    """Data of `tool_use`: the model calls a tool."""

    tool_use_id: str
    name: str
    input: dict[str, Any]


class ToolResult(BaseModel):
    """Data of `tool_result`: the tool's result as text, truncated at 100,000 characters."""

    tool_use_id: str
    content: str
    is_error: bool


class Reset(BaseModel):
    """Data of `reset`: deltas since the last tool event are void."""

    reason: str


class Notice(BaseModel):
    """Data of `notice`: an event between turns, also in `notices` of the next response; or missing heartbeats."""

    text: str


EventData = (
    SessionStarted
    | Delta
    | TextBlock
    | ToolUse
    | ToolResult
    | ApprovalRequest
    | ApprovalResolved
    | Reset
    | Notice
    | ChatResponse
    | ErrorBody
)


class LoggedEvent(BaseModel):
    """One event of a session's log. `event` determines the model of `data`."""

    id: str
    event: EventName
    at: str = Field(description="when it was stored, ISO 8601 in UTC")
    data: dict[str, Any]


class SessionEvents(BaseModel):
    """Response of `GET /v1/agent/session/{id}/events`: the log in order, with whole texts instead of deltas."""

    session_id: str
    count: int
    events: list[LoggedEvent]
    cut: bool = Field(description="whether earlier events have been deleted")
    next: str | None = Field(description="value of `after` for the next page; null if there are no more events now")


EventsAfter = Annotated[
    str | None, Field(pattern=EVENT_ID_PATTERN, description="id of an event; lists the events after it")
]
EventsLimit = Annotated[int, Field(ge=1, le=1000)]
EVENTS_PAGE = 100

_NAMES: dict[type[BaseModel], EventName] = {
    SessionStarted: "session",
    Delta: "delta",
    TextBlock: "text",
    ToolUse: "tool_use",
    ToolResult: "tool_result",
    ApprovalRequest: "approval_request",
    ApprovalResolved: "approval_resolved",
    Reset: "reset",
    Notice: "notice",
    ChatResponse: "result",
    ErrorBody: "error",
}


def parse_id(text: str | None) -> EventId | None:
    """Parse the id of the last event that a client received. Return None for none and for an invalid one."""
    generation, dot, sequence = (text or "").partition(".")
    if not dot or not all(part.isascii() and part.isdigit() and len(part) < 12 for part in (generation, sequence)):
        return None
    known = int(generation), int(sequence)
    return known if known[0] < 2**31 and known[1] < 2**31 else None


def show_id(event_id: EventId) -> str:
    """Return an id in its wire format."""
    return f"{event_id[0]}.{event_id[1]}"


def event_name(data: EventData) -> EventName:
    """Return the name of the event with this data."""
    return _NAMES[type(data)]


def encode(data: EventData, event_id: str | None = None) -> bytes:
    """Return one frame of an event stream (WHATWG HTML §9.2.6). JSON never contains a raw line break."""
    identity = f"id: {event_id}\n" if event_id else ""
    return f"{identity}event: {event_name(data)}\ndata: {data.model_dump_json(exclude_none=True)}\n\n".encode()


def decode(name: str, data: bytes) -> EventData | None:
    """Return the data of one frame as its model, None for an unknown name.

    Raises pydantic.ValidationError for data that does not match its name.
    """
    model = _MODELS.get(name)
    return None if model is None else model.model_validate_json(data)  # type: ignore[return-value]


_MODELS: dict[str, type[BaseModel]] = {name: model for model, name in _NAMES.items()}
