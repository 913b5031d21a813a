"""A session with its conversation, as in `GET /v1/agent/session/{id}`: one page of messages, the newest last."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from hypercore_agents.api.chat import SessionView

HISTORY_PAGE, HISTORY_LIMIT = 20, 200
TEXT_LIMIT, TOOL_LIMIT, TOOLS_LIMIT = 16_000, 1_000, 50
"""Maximum length of a message's text and of a tool's input or result, in characters, and tools of one message."""

HistoryCount = Annotated[int, Field(ge=0, le=HISTORY_LIMIT, description="number of messages, the newest ones; 0: none")]
HistoryBefore = Annotated[
    int | None,
    Field(ge=1, le=2**62, description="`history_next` of an earlier response; returns the messages before it"),
]


class ToolCall(BaseModel):
    """A tool call of the model. `input` is JSON, shortened."""

    id: str
    name: str
    input: str


class ToolOutcome(BaseModel):
    """The result of a tool, shortened. `id` is that of the call."""

    id: str
    text: str
    error: bool = False


class HistoryMessage(BaseModel):
    """One message. Tool results have the role `user`, as in the Claude API."""

    role: Literal["user", "assistant"]
    text: str = ""
    tool_uses: list[ToolCall] = Field(default_factory=list)
    tool_results: list[ToolOutcome] = Field(default_factory=list)
    at: str | None = Field(default=None, description="ISO 8601 in UTC")
    shortened: bool = Field(default=False, description="whether a part of it was shortened")


class SessionDetail(SessionView):
    """A session and the newest messages of its conversation, newest last, without those of subagents."""

    history: list[HistoryMessage] = Field(default_factory=list)
    history_next: int | None = Field(
        default=None,
        description="value of `before` for the page before this one; null if there is none. A page may be empty",
    )
