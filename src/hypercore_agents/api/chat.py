"""One turn of one session: the request, the answer, and what the manager adds between them."""

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from hypercore_agents.api.ids import SessionId, UserId
from hypercore_agents.api.options import SessionOptions

PROMPT_LIMIT = 2_000_000
"""Longest prompt, in characters."""

TurnStatus = Literal["completed", "interrupted", "max_turns", "max_tokens", "budget_exceeded", "refused"]
"""How a turn ended without an error. `refused`: the model declined; `max_tokens`: the answer is cut there."""


def _is_blank(character: str) -> bool:
    """Say whether JavaScript's `trim` removes a character: the Claude CLI sends no prompt of these alone; or whether it
    is a format character such as U+200B (Unicode category Cf), which shows nothing either."""
    return character.isspace() or unicodedata.category(character) == "Cf"


def _not_blank(value: str) -> str:
    if all(map(_is_blank, value)):
        raise ValueError(
            "is blank: the Claude CLI would not send it to the model; write at least one visible character"
        )
    return value


class ChatRequest(SessionOptions):
    """Body of `POST /v1/agent/chat`. The options count at the session's first turn, then they are frozen."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=PROMPT_LIMIT), AfterValidator(_not_blank)]
    user_id: UserId
    session_id: SessionId | None = Field(default=None, description="absent: a new session")
    max_tokens: int | None = Field(
        default=None, ge=1, le=1_000_000, description="output tokens that this turn may produce in all"
    )
    temperature: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    stream: bool = False
    on_disconnect: Literal["interrupt", "continue"] = Field(
        default="interrupt",
        description="what becomes of the turn when its client goes away; a stream goes on only after its first event",
    )
    when_busy: Literal["refuse", "queue"] = Field(
        default="refuse",
        description="while the session runs another turn: 409, or wait for its end (503 after a minute)",
    )

    def options(self) -> SessionOptions:
        """Return the session options that this request says."""
        return SessionOptions.model_validate(self.given())


class Placement(BaseModel):
    """What the manager decided about a turn before it relays it to the agent."""

    model_config = ConfigDict(extra="forbid")

    session_id: SessionId
    generation: int = Field(ge=1, le=2**31, description="rises each time the session moves to another agent")
    turn: int = Field(ge=1, le=2**31, description="the session's turn number, from 1")
    timeout: float = Field(gt=0, description="seconds that the turn may take in all")
    options: SessionOptions = Field(description="the session's frozen options, defaults filled in")


class PlacedChatRequest(ChatRequest):
    """A chat as an agent accepts it: only the manager, who holds the agent's bearer, can send one."""

    placement: Placement


class SessionOpening(BaseModel):
    """A session that an agent shall hold though no turn begins: its user wants its files. Only the manager says so.

    The placement's turn is the one that will come next.
    """

    model_config = ConfigDict(extra="forbid")

    user_id: UserId
    placement: Placement


class Usage(BaseModel):
    """Tokens and cost by the gateway's ledger. `input_tokens` includes those read from and written to caches."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cost_usd: float = 0.0


class ChatResponse(BaseModel):
    """Answer to a chat, and the data of a stream's `result` event."""

    session_id: str
    agent_id: str
    content: str
    usage: Usage
    status: TurnStatus
    turn: int
    tools: bool = Field(description="whether tools were offered")
    notices: list[str] = Field(
        default_factory=list, description="what the caller should know, such as why tools are off"
    )
    durable: bool = Field(default=True, description="whether this turn survives the loss of its agent")
    workspace_durable: bool = Field(default=True, description="whether the workspace's files do, as they are now")
    duration_ms: int = 0
    output: Any = Field(default=None, description="with `output_schema`: the answer as that schema says, parsed")


class InterruptResponse(BaseModel):
    """Answer to `POST /v1/agent/session/{id}/interrupt`."""

    session_id: str
    interrupted: bool = Field(description="false when no turn was running")


class SessionView(BaseModel):
    """A session as its user sees it. Times are ISO 8601 in UTC."""

    session_id: str
    user_id: str
    agent_id: str | None
    state: Literal["live", "parked", "ended"]
    turns: int
    running: bool
    created_at: str
    last_used_at: str
    usage: Usage


class SessionDeleted(BaseModel):
    """Answer of `DELETE /v1/agent/session/{id}`."""

    session_id: str
    deleted: bool = True
    notices: list[str] = Field(default_factory=list, description="what ended with it, if anything ran")


SESSIONS_PAGE = 1000
SessionsLimit = Annotated[int, Field(ge=1, le=SESSIONS_PAGE)]
SessionsAfter = Annotated[str, Field(max_length=100)]


class SessionList(BaseModel):
    """Answer of `GET /v1/agent/sessions`: a page."""

    user_id: str | None
    count: int
    sessions: list[SessionView]
    next: str | None = Field(default=None, description="`after` of the next page; none after the last")
