"""From the SDK's messages to the platform's events: one `Translator` per turn. Pure: no I/O, no clock.

What the messages of the pinned CLI really do, and what is made of it here:

- A model stream that is cut ends with `content_block_stop` and `message_stop` as if it were whole, but without
  `message_delta`; the message then starts again. So a message is whole only once its `message_delta` came, and a
  `message_start` before that is a `reset`. What earlier messages said since the last tool event is said again, because
  a reset voids it too.
- A tool call counts only when its message is whole: a cut message may have named one that never runs.
- The text that the CLI writes itself (API errors, "[Request interrupted by user]", "Output token limit hit") comes as
  messages of a synthetic model or of the user, and is never part of the answer.
- A subagent's messages carry `parent_tool_use_id`; only the session's own conversation is told.

All of it may be forged by a tool that writes to its CLI's output: sizes are bounded, and nothing here is trusted for
accounting.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from claude_agent_sdk import (
    AssistantMessage,
    Message,
    ResultMessage,
    StreamEvent,
    SystemMessage,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)

from hypercore_agents.api.events import Delta, Reset, ToolResult, ToolUse

TOOL_RESULT_LIMIT = 100_000
"""Characters of a tool's result that are told."""
TOOL_INPUT_LIMIT = 1_000_000
"""Characters of a tool's input, as JSON, that are told."""
CONTENT_LIMIT = 10_000_000
"""Characters of text in one turn; what is beyond is dropped and `overflowed` says so."""
_NAME_LIMIT = 256
_TOOL_NAMES = {"Task": "Agent"}
"""Tools that the CLI's first message calls by an older name than its model requests do."""

Event = Delta | ToolUse | ToolResult | Reset


@dataclass
class Translator:
    """What one turn has said so far."""

    result: ResultMessage | None = None
    offered: frozenset[str] | None = None
    """Tools that the CLI says it offers; None until it said so."""
    retries: int = 0
    retry_after: float | None = None
    """Seconds that the CLI last waited before it asked the model again."""
    mirror_errors: int = 0
    acted: bool = False
    """Whether the turn said text or called a tool, so that doing it again would do that twice."""
    overflowed: bool = False

    _segment: list[str] = field(default_factory=list)
    _before_message: int = 0
    _last_words: str = ""
    _said: int = 0
    _streaming: bool = False
    _whole: bool = True
    _calls: list[ToolUse] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The answer: the text since the last tool event, or else the last text before it."""
        return "".join(self._segment) or self._last_words

    def feed(self, message: Message) -> Iterator[Event]:
        """Take the next message and yield the events that it makes."""
        for event in self._events(message):
            self.acted = True
            yield event
        if self._calls:  # whole, and not told yet: the CLI runs them, also those of a stream that is cut after them
            self.acted = True

    def _events(self, message: Message) -> Iterator[Event]:
        if isinstance(message, StreamEvent):
            if message.parent_tool_use_id is None:
                yield from self._stream(message.event)
        elif isinstance(message, AssistantMessage):
            if message.parent_tool_use_id is None and message.error is None and message.model != "<synthetic>":
                yield from self._assistant(message)
        elif isinstance(message, UserMessage):
            if message.parent_tool_use_id is None and isinstance(message.content, list):
                yield from self._tool_results(message)
        elif isinstance(message, SystemMessage):
            self._system(message)
        elif isinstance(message, ResultMessage):
            yield from self._tool_calls()
            self.result = message

    def _stream(self, event: dict[str, Any]) -> Iterator[Event]:
        kind = event.get("type")
        if kind == "content_block_delta":
            delta = event.get("delta")
            if isinstance(delta, dict) and delta.get("type") == "text_delta":
                yield from self._say(delta.get("text"))
        elif kind == "message_start":
            if not self._whole:
                yield from self._start_again()
            self._before_message = len(self._segment)
            self._streaming, self._whole = True, False
        elif kind == "message_delta":
            self._whole = True
            yield from self._tool_calls()
        elif kind == "message_stop":
            self._streaming = False

    def _start_again(self) -> Iterator[Event]:
        spoken = len(self._segment) > self._before_message
        self._calls.clear()
        del self._segment[self._before_message :]
        if spoken:
            yield Reset(reason="the model's stream was cut and starts again")
            if self._segment:
                yield Delta(text="".join(self._segment))

    def _say(self, text: Any) -> Iterator[Event]:
        if not isinstance(text, str) or not text:
            return
        text = text[: max(0, CONTENT_LIMIT - self._said)]
        if not text:
            self.overflowed = True
            return
        self._said += len(text)
        self._segment.append(text)
        yield Delta(text=text)

    def _assistant(self, message: AssistantMessage) -> Iterator[Event]:
        for block in message.content:
            if isinstance(block, TextBlock) and not self._streaming:
                yield from self._say(block.text)
            elif isinstance(block, ToolUseBlock):
                self._calls.append(
                    ToolUse(
                        tool_use_id=str(block.id)[:_NAME_LIMIT],
                        name=str(block.name)[:_NAME_LIMIT],
                        input=_bounded(block.input),
                    )
                )

    def _tool_calls(self) -> Iterator[Event]:
        if self._calls:
            self._end_segment()
            yield from self._calls
            self._calls.clear()

    def _tool_results(self, message: UserMessage) -> Iterator[Event]:
        for block in message.content:
            if isinstance(block, ToolResultBlock):
                yield from self._tool_calls()
                self._end_segment()
                yield ToolResult(
                    tool_use_id=str(block.tool_use_id)[:_NAME_LIMIT],
                    content=_text_of(block.content)[:TOOL_RESULT_LIMIT],
                    is_error=bool(block.is_error),
                )

    def _end_segment(self) -> None:
        if self._segment:
            self._last_words = "".join(self._segment)
            self._segment.clear()
        self._before_message = 0

    def _system(self, message: SystemMessage) -> None:
        if message.subtype == "init":
            tools = message.data.get("tools")
            if isinstance(tools, list):
                self.offered = frozenset(_TOOL_NAMES.get(tool, tool) for tool in tools if isinstance(tool, str))
        elif message.subtype == "mirror_error":
            self.mirror_errors += 1
        elif message.subtype == "api_retry":
            self.retries += 1
            delay = message.data.get("retry_delay_ms")
            if isinstance(delay, int | float) and 0 <= delay < 3_600_000:
                self.retry_after = delay / 1000


def _bounded(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {}
    if len(json.dumps(value, default=str)) > TOOL_INPUT_LIMIT:
        return {"omitted": f"the input is longer than {TOOL_INPUT_LIMIT} characters"}
    return value


def _text_of(content: Any) -> str:
    """Return a tool result's text; blocks that are not text are named, not told."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return str(content)
    parts = []
    for block in content:
        if isinstance(block, dict) and block.get("type") == "text":
            parts.append(str(block.get("text", "")))
        elif isinstance(block, dict):
            parts.append(f"[{str(block.get('type', 'unknown'))[:_NAME_LIMIT]}]")
    return "\n".join(parts)
