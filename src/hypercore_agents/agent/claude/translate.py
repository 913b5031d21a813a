"""Translates the SDK's messages into the platform's events: one `Translator` per turn. Pure: no I/O, no clock.

Behaviour of the pinned CLI's messages, and its translation:

- A model stream that is cut ends with `content_block_stop` and `message_stop`, like a complete one, but without
  `message_delta`; the message then starts again. So a message is complete only after its `message_delta`, and a
  `message_start` before that becomes a `reset`. Text of earlier messages since the last tool event is repeated after
  the reset, because a reset voids it too.
- A tool call counts only when its message is complete: a cut message may contain a call that never runs.
- Text of the CLI itself (API errors, "[Request interrupted by user]", "Output token limit hit") comes as messages of a
  synthetic model or of the user, and is never part of the answer.
- A subagent's messages carry `parent_tool_use_id` and produce no events.

A tool can forge any message by writing to its CLI's output. So sizes are bounded, and nothing here is trusted for
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
"""Maximum characters of a tool's result in an event."""
TOOL_INPUT_LIMIT = 1_000_000
"""Maximum characters of a tool's input in an event, as JSON."""
CONTENT_LIMIT = 10_000_000
"""Maximum characters of text in one turn. Text beyond it is dropped, and `overflowed` is set."""
_NAME_LIMIT = 256
_TOOL_NAMES = {"Task": "Agent"}
"""Tools that have an older name in the CLI's first message than in its model requests."""

Event = Delta | ToolUse | ToolResult | Reset


@dataclass
class Translator:
    """Translates one turn and holds its answer so far."""

    result: ResultMessage | None = None
    offered: frozenset[str] | None = None
    """Tools that the CLI reports as offered; None before its first message."""
    retries: int = 0
    retry_after: float | None = None
    """The CLI's last pause before it repeated a model request, in seconds."""
    mirror_errors: int = 0
    acted: bool = False
    """Whether the turn produced text or called a tool, so that repeating it would do that twice."""
    overflowed: bool = False

    _segment: list[str] = field(default_factory=list)
    _before_message: int = 0
    _last_text: str = ""
    _text_length: int = 0
    _streaming: bool = False
    _complete: bool = True
    _calls: list[ToolUse] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The answer: the text since the last tool event, or the last text before it if there is none."""
        return "".join(self._segment) or self._last_text

    def feed(self, message: Message) -> Iterator[Event]:
        """Process the next message and yield its events."""
        for event in self._events(message):
            self.acted = True
            yield event
        if self._calls:  # no event yet, but the CLI runs them, also if the stream is cut after them
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
                yield from self._add_text(delta.get("text"))
        elif kind == "message_start":
            if not self._complete:
                yield from self._reset()
            self._before_message = len(self._segment)
            self._streaming, self._complete = True, False
        elif kind == "message_delta":
            self._complete = True
            yield from self._tool_calls()
        elif kind == "message_stop":
            self._streaming = False

    def _reset(self) -> Iterator[Event]:
        has_text = len(self._segment) > self._before_message
        self._calls.clear()
        del self._segment[self._before_message :]
        if has_text:
            yield Reset(reason="the model's stream was cut and starts again")
            if self._segment:
                yield Delta(text="".join(self._segment))

    def _add_text(self, text: Any) -> Iterator[Event]:
        if not isinstance(text, str) or not text:
            return
        text = text[: max(0, CONTENT_LIMIT - self._text_length)]
        if not text:
            self.overflowed = True
            return
        self._text_length += len(text)
        self._segment.append(text)
        yield Delta(text=text)

    def _assistant(self, message: AssistantMessage) -> Iterator[Event]:
        for block in message.content:
            if isinstance(block, TextBlock) and not self._streaming:
                yield from self._add_text(block.text)
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
            self._last_text = "".join(self._segment)
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
    """Return a tool result's text, with a placeholder for each block of another type."""
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
