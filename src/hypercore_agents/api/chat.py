"""Models of one turn of a session: the request, the response, and what the manager adds between them."""

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from hypercore_agents.api.ids import SessionId, UserId
from hypercore_agents.api.options import SessionOptions

PROMPT_LIMIT = 2_000_000
"""Maximum length of a prompt, in characters."""

TurnStatus = Literal["completed", "interrupted", "max_turns", "max_tokens", "budget_exceeded", "refused"]
"""How a turn ended without an error. `refused`: the model declined; `max_tokens`: the answer is truncated."""


def _is_blank(character: str) -> bool:
    """Return whether a character is invisible: whitespace or a format character (Unicode category Cf, such as U+200B).

    The Claude CLI does not send a prompt that JavaScript's `trim` reduces to nothing.
    """
    return character.isspace() or unicodedata.category(character) == "Cf"


def _not_blank(value: str) -> str:
    if all(map(_is_blank, value)):
        raise ValueError("is blank; it must contain at least one visible character")
    return value


class ChatRequest(SessionOptions):
    """Body of `POST /v1/agent/chat`. The first turn of a session sets its options; later they cannot change."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=PROMPT_LIMIT), AfterValidator(_not_blank)]
    user_id: UserId
    session_id: SessionId | None = Field(default=None, description="absent: start a new session")
    max_tokens: int | None = Field(
        default=None, ge=1, le=1_000_000, description="maximum number of output tokens of this turn"
    )
    temperature: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    stream: bool = False
    on_disconnect: Literal["interrupt", "continue"] = Field(
        default="interrupt",
        description="what happens to the turn if its client disconnects; streams continue only after the first event",
    )
    when_busy: Literal["refuse", "queue"] = Field(
        default="refuse",
        description="if the session is running another turn: refuse with 409, or wait for its end (503 after a minute)",
    )

    def options(self) -> SessionOptions:
        """Return the session options that this request sets."""
        return SessionOptions.model_validate(self.given())


class Placement(BaseModel):
    """The manager's decisions about a turn, sent to the agent with it."""

    model_config = ConfigDict(extra="forbid")

    session_id: SessionId
    generation: int = Field(ge=1, le=2**31, description="increases each time the session moves to another agent")
    turn: int = Field(ge=1, le=2**31, description="the session's turn number, from 1")
    timeout: float = Field(gt=0, description="maximum duration of the turn, in seconds")
    options: SessionOptions = Field(description="the session's final options, with defaults")


class PlacedChatRequest(ChatRequest):
    """A chat request as agents accept it. Only the manager can send one: it has the agent's bearer token."""

    placement: Placement


class SessionOpening(BaseModel):
    """Asks an agent to open a session without a turn, for access to its files. Only the manager sends it.

    The placement has the number of the session's next turn.
    """

    model_config = ConfigDict(extra="forbid")

    user_id: UserId
    placement: Placement


class Usage(BaseModel):
    """Tokens and cost from the gateway's ledger. `input_tokens` includes tokens read from and written to caches."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cost_usd: float = 0.0


class ChatResponse(BaseModel):
    """Response to a chat, and the data of a stream's `result` event."""

    session_id: str
    agent_id: str
    content: str
    usage: Usage
    status: TurnStatus
    turn: int
    tools: bool = Field(description="whether the model could use tools")
    notices: list[str] = Field(
        default_factory=list, description="information for the caller, such as why tools are disabled"
    )
    durable: bool = Field(default=True, description="whether this turn is stored and survives the loss of its agent")
    workspace_durable: bool = Field(default=True, description="whether the current files of the workspace survive it")
    duration_ms: int = 0
    output: Any = Field(default=None, description="with `output_schema`: the parsed answer, which matches the schema")


class InterruptResponse(BaseModel):
    """Response to `POST /v1/agent/session/{id}/interrupt`."""

    session_id: str
    interrupted: bool = Field(description="false if no turn was running")


class SessionView(BaseModel):
    """A session as shown to its user. Times are ISO 8601 in UTC."""

    session_id: str
    user_id: str
    agent_id: str | None
    state: Literal["live", "parked", "ended"] = Field(
        description="`live`: placed on an agent; `parked`: unplaced, until its next turn; `ended`: final"
    )
    turns: int
    running: bool
    created_at: str
    last_used_at: str
    usage: Usage


class SessionDeleted(BaseModel):
    """Response of `DELETE /v1/agent/session/{id}`."""

    session_id: str
    deleted: bool = True
    notices: list[str] = Field(default_factory=list, description="what was stopped with it, such as a running turn")


SESSIONS_PAGE = 1000
SessionsLimit = Annotated[int, Field(ge=1, le=SESSIONS_PAGE)]
SessionsAfter = Annotated[str, Field(max_length=100)]


class SessionList(BaseModel):
    """Response of `GET /v1/agent/sessions`: one page."""

    user_id: str | None
    count: int
    sessions: list[SessionView]
    next: str | None = Field(default=None, description="value of `after` for the next page; null on the last page")
