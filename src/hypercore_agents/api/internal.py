"""Models of the gateway's `/internal` routes for agents, and the names of the platform's own headers."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hypercore_agents.api.chat import Usage
from hypercore_agents.api.ids import AgentId, SessionId

REQUEST_ID_HEADER = "x-request-id"
INTERNAL_HEADER_PREFIX = "x-hypercore-"
"""Prefix of the platform's own headers. They are removed from incoming requests before the platform adds its own."""


TRANSCRIPT_LINE_LIMIT = 8 * 1024 * 1024
"""Maximum length of a transcript entry, in characters: enough for a tool result with an image."""
EVENT_LIMIT = 2_000_000
"""Maximum length of an event's data in a session's log, in characters of JSON."""
SUBPATH_PATTERN = r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,2})?$"
"""Path of a subagent's transcript below the session's; it cannot leave that folder."""


class EnrolRequest(BaseModel):
    """Body of `POST /internal/enrol`, the only internal route without an agent token."""

    model_config = ConfigDict(extra="forbid")

    agent_id: AgentId
    secret: str = Field(min_length=32, max_length=128, description="one-time secret from the start of the sandbox")
    public_key: str = Field(
        pattern=r"^[A-Za-z0-9+/]{43}=$",
        description="base64 of the agent's X25519 public key (32 bytes); the response is encrypted to it",
    )


class EnrolResponse(BaseModel):
    """`sealed` is the base64 of an EnrolmentGrant, encrypted to the agent's key by HPKE (RFC 9180, base mode)."""

    sealed: str


DRAIN_RESERVE_SECONDS = 20.0
"""Time after the turns' grace period for interrupting turns, archiving workspaces and sending the last events."""


class AgentConfiguration(BaseModel):
    """Configuration of an agent. It contains no secrets and no data of users."""

    max_concurrent: int = Field(description="maximum number of sessions placed on this agent")
    tools: bool = Field(description="whether sessions may use tools")
    tools_reason: str | None = Field(default=None, description="why sessions may not use tools")
    needs_separation: bool = Field(
        default=False, description="whether tools require a launcher that isolates sessions from each other"
    )
    sessions_move: bool = Field(
        default=True, description="whether sessions move to other agents when this one drains (in the pool)"
    )
    heartbeat_seconds: float = Field(default=6.0, gt=0, description="interval of heartbeats")


class EnrolmentGrant(BaseModel):
    """What an agent receives by enrolment."""

    agent_token: str
    expires_at: float = Field(description="expiry of the agent token, Unix seconds")
    bearer: str = Field(description="bearer token that the manager sends to the agent")
    configuration: AgentConfiguration


class AgentToken(BaseModel):
    """Response of `POST /internal/agent-token`: a renewed agent token."""

    agent_token: str
    expires_at: float


class Heartbeat(BaseModel):
    """Body of `POST /internal/heartbeat`: the state of an agent.

    The sandbox is not trusted: values are bounded and do not influence placement. False values can at most enlarge the
    pool within its bounds.
    """

    model_config = ConfigDict(extra="forbid")

    ready: bool = Field(description="whether the agent accepts turns")
    sessions: int = Field(ge=0, le=100_000, description="sessions placed on this agent")
    live: int = Field(ge=0, le=100_000, description="sessions with a Claude CLI process")
    running: int = Field(ge=0, le=100_000, description="running turns")
    waiting: int = Field(ge=0, le=100_000, description="turns waiting for a process")
    memory_mb: int = Field(ge=0, le=10_000_000)
    memory_limit_mb: int = Field(ge=1, le=10_000_000)
    cpu: float | None = Field(
        default=None, ge=0, le=1, description="share of its cores in use since the last heartbeat"
    )
    queue_wait_seconds: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="95th percentile over the turns of the last minute; null if there were none",
    )
    start_wait_seconds: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="how long starts of Claude CLIs waited for the CPUs of the agent and its host, as above",
    )


class HeartbeatTaken(BaseModel):
    """Response of `POST /internal/heartbeat`."""

    at: float = Field(description="when it was stored, Unix seconds")


class SessionTokenRequest(BaseModel):
    """Body of `POST /internal/session-tokens`."""

    model_config = ConfigDict(extra="forbid")

    session_id: SessionId
    generation: int = Field(ge=1)


LoggedName = Literal[
    "session", "text", "tool_use", "tool_result", "approval_request", "approval_resolved", "reset", "notice", "result",
    "error",
]  # fmt: skip
"""Events that a session's log stores: all except deltas."""


class EventMark(BaseModel):
    """The last event in a session's log; the next agent continues its numbering."""

    generation: int
    sequence: int
    name: LoggedName
    notice: str | None = Field(default=None, description="text of a notice that no turn has reported yet")


class SessionToken(BaseModel):
    """A credential with which one session's CLI calls the gateway's model routes."""

    session_token: str
    expires_at: float = Field(description="Unix seconds")
    last_event: EventMark | None = Field(default=None, description="null if the session's log is empty")


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain null characters; JSON writes them as an escape")
    return text


Storable = Annotated[str, AfterValidator(_storable)]
"""Text that every store accepts: PostgreSQL rejects null characters."""


class TranscriptEntry(BaseModel):
    """One line of a transcript. `subpath` is empty for the session's transcript, else that of a subagent."""

    model_config = ConfigDict(extra="forbid")

    subpath: str = Field(default="", max_length=256, pattern=SUBPATH_PATTERN)
    uuid: Storable = Field(min_length=1, max_length=64)
    line: Storable = Field(max_length=TRANSCRIPT_LINE_LIMIT)


class EventEntry(BaseModel):
    """One event for the session's log. `data` is its JSON."""

    model_config = ConfigDict(extra="forbid")

    generation: int = Field(ge=1, lt=2**31)
    sequence: int = Field(ge=1, lt=2**31)
    name: LoggedName
    data: Storable = Field(max_length=EVENT_LIMIT)


class TranscriptAppend(BaseModel):
    """Body of `POST /internal/sessions/{id}/transcript`: entries and events in the order of their creation."""

    model_config = ConfigDict(extra="forbid")

    generation: int = Field(ge=1)
    entries: list[TranscriptEntry] = Field(default_factory=list, max_length=1000)
    events: list[EventEntry] = Field(default_factory=list, max_length=1000)
    turn: int | None = Field(
        default=None, ge=1, lt=2**31, description="with a turn's last entries: return the turn's usage"
    )


class TranscriptTaken(BaseModel):
    """Response: the entries and events are stored."""

    entries: int
    events: int = 0
    usage: Usage | None = Field(default=None, description="usage of the requested turn, from the ledger")


class Transcript(BaseModel):
    """Response of `GET /internal/sessions/{id}/transcript?after=`: a page of entries in order; all without `after`."""

    entries: list[TranscriptEntry]
    next: int | None = Field(default=None, description="value of `after` for the next page; null on the last page")
    workspace: str | None = Field(description="digest of the archived workspace; null if none was archived")


class WorkspaceStored(BaseModel):
    """A stored workspace archive. `digest` is its SHA-256 and its name."""

    digest: str
    size: int
