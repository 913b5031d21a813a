"""A session with what was said in it, as `GET /v1/agent/session/{id}` shows it: a page of messages, newest last."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from hypercore_agents.api.chat import SessionView

HISTORY_PAGE, HISTORY_LIMIT = 20, 200
TEXT_LIMIT, TOOL_LIMIT, TOOLS_LIMIT = 16_000, 1_000, 50
"""Longest text of a message and of a tool's input or result, in characters, and most tools of one message."""

HistoryCount = Annotated[
    int, Field(ge=0, le=HISTORY_LIMIT, description="messages of the conversation to show, the newest; 0: none")
]
HistoryBefore = Annotated[
    int | None, Field(ge=1, le=2**62, description="`history_next` of an earlier answer: show the messages before it")
]


class ToolCall(BaseModel):
    """A tool that the model called. `input`: JSON, shortened."""

    id: str
    name: str
    input: str


class ToolOutcome(BaseModel):
    """What a tool answered, shortened. `id` is the call's."""

    id: str
    text: str
    error: bool = False


class HistoryMessage(BaseModel):
    """One message. Tools' results have the role `user`, as they have where the model reads them."""

    role: Literal["user", "assistant"]
    text: str = ""
    tool_uses: list[ToolCall] = Field(default_factory=list)
    tool_results: list[ToolOutcome] = Field(default_factory=list)
    at: str | None = Field(default=None, description="ISO 8601 in UTC")
    shortened: bool = Field(default=False, description="whether anything of it was cut")


class SessionDetail(SessionView):
    """A session and the newest messages of its conversation, newest last; subagents' are not among them."""

    history: list[HistoryMessage] = Field(default_factory=list)
    history_next: int | None = Field(
        default=None,
        description="given as `before`: the messages before these; null: there are none. A page may be short, or empty",
    )
