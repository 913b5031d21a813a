"""What agents and the gateway say to one another under `/internal`, and the headers between our own parts."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hypercore_agents.api.chat import Usage
from hypercore_agents.api.ids import AgentId, SessionId

REQUEST_ID_HEADER = "x-request-id"
INTERNAL_HEADER_PREFIX = "x-hypercore-"
"""Headers with this prefix are ours: stripped from what comes in, before our own are added."""


TRANSCRIPT_LINE_LIMIT = 8 * 1024 * 1024
"""Longest entry of a transcript, in characters: a tool's result with an image fits."""
EVENT_LIMIT = 2_000_000
"""Longest data of an event in a session's log, in characters of JSON."""
SUBPATH_PATTERN = r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,2})?$"
"""A subagent's transcript, below the session's; it cannot lead out of its folder."""


class EnrolRequest(BaseModel):
    """Body of `POST /internal/enrol`, the only internal route without an agent token."""

    model_config = ConfigDict(extra="forbid")

    agent_id: AgentId
    secret: str = Field(min_length=32, max_length=128, description="the one-use secret of the start")
    public_key: str = Field(
        pattern=r"^[A-Za-z0-9+/]{43}=$",
        description="base64 of 32 bytes, X25519, made by the agent; the answer is sealed to it",
    )


class EnrolResponse(BaseModel):
    """`sealed`: base64 of an HPKE message (RFC 9180, base mode) to the agent's key; inside, an EnrolmentGrant."""

    sealed: str


DRAIN_RESERVE_SECONDS = 20.0
"""What an agent needs to end after its turns had their time: to interrupt them, to archive, to send the last events."""


class AgentConfiguration(BaseModel):
    """What an agent must know about itself. Nothing here is secret and nothing is about a user."""

    max_concurrent: int = Field(description="sessions that may be placed here")
    tools: bool = Field(description="whether sessions may use tools")
    tools_reason: str | None = Field(default=None, description="why not, when not")
    needs_separation: bool = Field(
        default=False, description="whether tools are only for an agent whose launcher keeps sessions apart"
    )
    sessions_move: bool = Field(
        default=True, description="whether sessions go on elsewhere when this agent takes no turns (the pool's do)"
    )
    heartbeat_seconds: float = Field(default=6.0, gt=0, description="pause between heartbeats")


class EnrolmentGrant(BaseModel):
    """What enrolment gives to an agent."""

    agent_token: str
    expires_at: float = Field(description="of the agent token, Unix seconds")
    bearer: str = Field(description="what the manager will present to the agent")
    configuration: AgentConfiguration


class AgentToken(BaseModel):
    """Answer of `POST /internal/agent-token`: a renewed agent token."""

    agent_token: str
    expires_at: float


class Heartbeat(BaseModel):
    """Body of `POST /internal/heartbeat`: how an agent is. It is a sandbox's word, so it is bounded and decides nothing
    about who is placed where; a lie makes at most the pool larger, within its bounds.
    """

    model_config = ConfigDict(extra="forbid")

    ready: bool = Field(description="whether it takes turns")
    sessions: int = Field(ge=0, le=100_000, description="sessions placed here")
    live: int = Field(ge=0, le=100_000, description="sessions with a Claude CLI process")
    running: int = Field(ge=0, le=100_000, description="turns running now")
    waiting: int = Field(ge=0, le=100_000, description="turns that wait for a process now")
    memory_mb: int = Field(ge=0, le=10_000_000)
    memory_limit_mb: int = Field(ge=1, le=10_000_000)
    cpu: float | None = Field(default=None, ge=0, le=1, description="share of its cores in use since the last beat")
    queue_wait_seconds: float | None = Field(
        default=None, ge=0, le=3600, description="95th percentile over the turns of the last minute; null: none"
    )
    start_wait_seconds: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="how long starts of Claude CLIs waited for the agent's and its host's processors, as above",
    )


class HeartbeatTaken(BaseModel):
    """Answer of `POST /internal/heartbeat`."""

    at: float = Field(description="when it was taken, Unix seconds")


class SessionTokenRequest(BaseModel):
    """Body of `POST /internal/session-tokens`."""

    model_config = ConfigDict(extra="forbid")

    session_id: SessionId
    generation: int = Field(ge=1)


LoggedName = Literal[
    "session", "text", "tool_use", "tool_result", "approval_request", "approval_resolved", "reset", "notice", "result",
    "error",
]  # fmt: skip
"""Events that a session's log keeps: all but deltas."""


class EventMark(BaseModel):
    """The last event that is in a session's log: whoever goes on with the session counts on from it."""

    generation: int
    sequence: int
    name: LoggedName
    notice: str | None = Field(default=None, description="of a notice: its text, which no turn has told since")


class SessionToken(BaseModel):
    """A credential with which one session's CLI calls the gateway's model routes."""

    session_token: str
    expires_at: float = Field(description="Unix seconds")
    last_event: EventMark | None = Field(default=None, description="None: the session's log is empty")


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must hold no NUL character; JSON writes it as an escape")
    return text


Storable = Annotated[str, AfterValidator(_storable)]
"""A text that every store keeps: PostgreSQL has no place for NUL."""


class TranscriptEntry(BaseModel):
    """One line of a transcript. `subpath` is empty for the session's own, else names a subagent's."""

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
    """Body of `POST /internal/sessions/{id}/transcript`: entries and events in the order in which they were written."""

    model_config = ConfigDict(extra="forbid")

    generation: int = Field(ge=1)
    entries: list[TranscriptEntry] = Field(default_factory=list, max_length=1000)
    events: list[EventEntry] = Field(default_factory=list, max_length=1000)
    turn: int | None = Field(default=None, ge=1, lt=2**31, description="with a turn's last entries: tell what it used")


class TranscriptTaken(BaseModel):
    """Answer: the entries and events are in the store."""

    entries: int
    events: int = 0
    usage: Usage | None = Field(default=None, description="of the turn that was asked for, by the ledger")


class Transcript(BaseModel):
    """Answer of `GET /internal/sessions/{id}/transcript?after=`: entries in order, by page; all without `after`."""

    entries: list[TranscriptEntry]
    next: int | None = Field(default=None, description="`after` of the next page; None: this is the last")
    workspace: str | None = Field(description="digest of the archived workspace; None: none was archived")


class WorkspaceStored(BaseModel):
    """What arrived of a workspace's archive. `digest` is its SHA-256, which names it from now on."""

    digest: str
    size: int
