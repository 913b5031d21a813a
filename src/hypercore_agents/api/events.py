"""The events of a streamed turn, as server-sent events.

Every frame has an `event:` line, a JSON `data:` line and an `id:` of the form `generation.sequence`.
In order: one `session` (and another one where its agent could not begin the turn, which moved to another agent before
anything was done; the last one counts); then any number of `delta`, `tool_use`, `tool_result` and `reset`; then exactly
one `result` or `error`, which is the last. A comment line comes every 15 s while nothing else does.
`reset` says that the model's stream was cut and starts again: drop the deltas since the last
`tool_use`, `tool_result` or `session`. `approval_request` says that a tool call waits for the user
(`POST /v1/agent/session/{id}/approvals/{approval_id}`), `approval_resolved` how that ended.
`text` is a whole piece of the answer's text, as the session's log keeps it: it stands where deltas were, under the last
one's id, and only who takes a stream up again may get it.
`notice` comes between turns: something that concerns the session happened, such as the end of what a turn had left
running in the background. In a turn's stream it comes, without an `id`, when the turn's agent is not heard of; the turn
goes on, or ends with `error` if the agent is lost.
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
LOST_IN_MID_TURN = "the agent was lost in mid-turn; how the turn ended is in the history, if it did"
QUIET: tuple[EventName, ...] = ("result", "error", "notice")
"""Events after which no turn is in the middle."""
EVENT_ID_PATTERN = r"^[1-9][0-9]{0,9}\.[0-9]{1,10}$"
EventId = tuple[int, int]
"""Generation of the session's placement, and sequence within it: as tuples they rise in the order of the events."""
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
    """Data of `text`: all that the answer said between two other events."""

    text: str
    truncated: bool = Field(default=False, description="whether the log holds only the beginning")


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


class Notice(BaseModel):
    """Data of `notice`: what happened to the session while no turn ran, which the next answer's `notices` have too; or
    that the agent of a running turn is not heard of."""

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
    """One event of a session's log. `data` is the model that `event` names."""

    id: str
    event: EventName
    at: str = Field(description="when the store took it, ISO 8601 in UTC")
    data: dict[str, Any]


class SessionEvents(BaseModel):
    """Answer of `GET /v1/agent/session/{id}/events`: the log in order; no deltas, whole texts instead."""

    session_id: str
    count: int
    events: list[LoggedEvent]
    cut: bool = Field(description="whether events before these are no longer kept")
    next: str | None = Field(description="`after` of the next page; null: there is no more now")


EventsAfter = Annotated[
    str | None, Field(pattern=EVENT_ID_PATTERN, description="id of an event; those that come after it are listed")
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
    """Return the id that a client saw last, None for none and for what is no id of ours."""
    generation, dot, sequence = (text or "").partition(".")
    if not dot or not all(part.isascii() and part.isdigit() and len(part) < 12 for part in (generation, sequence)):
        return None
    known = int(generation), int(sequence)
    return known if known[0] < 2**31 and known[1] < 2**31 else None


def show_id(event_id: EventId) -> str:
    """Return an id as it travels."""
    return f"{event_id[0]}.{event_id[1]}"


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
