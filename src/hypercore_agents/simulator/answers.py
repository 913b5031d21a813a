"""Compute the simulator's answer from the conversation, the settings and the number of earlier requests for it.

Lengths are counted in tokens: one for every 4 characters or part of 4, of a text or of the JSON of a tool's input. The
same rule truncates an answer at `max_tokens`.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from hypercore_agents.simulator.conversation import Conversation
from hypercore_agents.simulator.directives import (
    Cache,
    CallTool,
    Directive,
    Fault,
    FirstToken,
    Rate,
    Recall,
    Say,
    Stop,
    Tokens,
    parse,
)
from hypercore_agents.simulator.instances import instance
from hypercore_agents.simulator.request import MessagesRequest

TOKEN_CHARACTERS = 4
_QUOTED_ECHO = 200
_QUOTED_RESULT = 4000
_QUOTED_SYSTEM = 500
_QUOTED_PROMPT = 2000
_FILLER = "This text goes on for as long as it was asked to, one word after another, and means nothing. "

Attempts = Callable[[str], int]
"""Returns the number of calls with this key, including the current one."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values from flags for every answer; directives in a prompt override them."""

    ttft: float = 0.0
    rate: float = 0.0
    tokens: int | None = None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A text block."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A tool_use block; `input` is JSON, which `max_tokens` may truncate."""

    id: str
    name: str
    input: str


Block = Text | ToolUse


@dataclass(frozen=True, slots=True)
class Answer:
    """A message to send. `ttft` is in seconds, `rate` in tokens per second (0: no pacing)."""

    id: str
    model: str
    blocks: tuple[Block, ...]
    stop_reason: str
    stop_sequence: str | None
    input_tokens: int
    output_tokens: int
    cache: Cache
    ttft: float
    rate: float
    fault: Fault | None


@dataclass(frozen=True, slots=True)
class _Step:
    """The directives for one message of the script, and the tool call that ends it."""

    number: int
    directives: tuple[Directive, ...]
    tool: CallTool | None


def tokens_of(text: str) -> int:
    """Return the number of tokens in a text."""
    return math.ceil(len(text) / TOKEN_CHARACTERS)


def answer(
    request: MessagesRequest,
    conversation: Conversation,
    *,
    identity: str,
    scope: str,
    input_tokens: int,
    defaults: Defaults,
    attempts: Attempts,
) -> Answer:
    """Compute the answer to a request.

    `identity` is a digest of the request, from which ids are derived. `scope` (the CLI's session id, if the request has
    one) separates the counts of limited faults. Raises ApiFailure (400) for a malformed directive.
    """
    directives, plain = parse(conversation.prompt)
    step = _current_step(directives, conversation)
    blocks = _blocks(step, plain, conversation, defaults, identity)
    stop = next((each.reason for each in step.directives if isinstance(each, Stop)), None)
    stop_reason = stop or ("tool_use" if any(isinstance(block, ToolUse) for block in blocks) else "end_turn")
    blocks, sequence = _cut_at_stop_sequence(blocks, request.stop_sequences)
    if sequence is not None:
        stop_reason = "stop_sequence"
    blocks, output_tokens, complete = _truncated(blocks, request.max_tokens)
    if not complete:
        stop_reason, sequence = "max_tokens", None
    pace = _Pace(defaults, step.directives)
    return Answer(
        id=f"msg_{identity[:24]}",
        model=request.model,
        blocks=blocks,
        stop_reason=stop_reason,
        stop_sequence=sequence,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache=pace.cache,
        ttft=pace.ttft,
        rate=pace.rate,
        fault=_fault(step, conversation, scope, defaults, attempts),
    )


class _Pace:
    """Pace and cache of this message: the latest directives from the script's start to the message's end."""

    def __init__(self, defaults: Defaults, directives: Iterable[Directive]) -> None:
        self.ttft = defaults.ttft
        self.rate = defaults.rate
        self.cache = Cache(0, 0)
        for each in directives:
            match each:
                case FirstToken(seconds):
                    self.ttft = seconds
                case Rate(tokens_per_second):
                    self.rate = tokens_per_second
                case Cache():
                    self.cache = each


def _current_step(directives: tuple[Directive, ...], conversation: Conversation) -> _Step:
    """Return the script's step after the tool calls that already have results."""
    number = 0
    found: list[Directive] = []
    for each in directives:
        if not isinstance(each, CallTool):
            found.append(each)
        elif each.name not in conversation.offered:
            offered = ", ".join(sorted(conversation.offered)) or "none"
            found.append(Say(f"The tool {each.name} is not offered in this request (offered: {offered})."))
        elif number == len(conversation.results):
            return _Step(number, tuple(found), each)
        else:
            number += 1
            found = [directive for directive in found if isinstance(directive, FirstToken | Rate | Cache)]
    return _Step(number, tuple(found), None)


_ANSWER_TOOL = "StructuredOutput"
"""The tool that the Claude CLI offers for an answer that follows an output schema."""
_REMINDER = "[structured-output-enforce]"
"""Start of the prompt that the CLI sends after an answer without that tool; scripted answers do not change."""


def _blocks(
    step: _Step, plain: str, conversation: Conversation, defaults: Defaults, identity: str
) -> tuple[Block, ...]:
    echo = _shortened(plain)
    if conversation.schema is not None:
        return (Text(json.dumps(instance(conversation.schema, echo), ensure_ascii=False)),)
    tool = step.tool
    unscripted = not step.directives and not conversation.results and not echo.startswith(_REMINDER)
    if tool is None and unscripted and _ANSWER_TOOL in conversation.offered:
        value = instance(conversation.offered[_ANSWER_TOOL], echo)
        tool = CallTool(_ANSWER_TOOL, value if isinstance(value, dict) else {})
    if tool is None and conversation.forced is not None and not conversation.results:
        name = conversation.forced or next(iter(conversation.offered), "")
        if name in conversation.offered:
            value = instance(conversation.offered[name] or {"type": "object"}, echo)
            tool = CallTool(name, value if isinstance(value, dict) else {})
    texts = [each.text if isinstance(each, Say) else _recalled(each, conversation) for each in step.directives
             if isinstance(each, Say | Recall)]  # fmt: skip
    text = "\n".join(texts)
    length = next((each.count for each in step.directives if isinstance(each, Tokens)), None)
    if not texts and tool is None:
        text = _default(conversation, echo)
        length = length or defaults.tokens
    if length is not None:
        text = _with_length(text, length)
    blocks: list[Block] = [Text(text)] if text else []
    if tool is not None:
        blocks.append(ToolUse(f"toolu_{identity[-24:]}", tool.name, json.dumps(tool.input)))
    return tuple(blocks)


def _default(conversation: Conversation, echo: str) -> str:
    lines = [f"Turn {len(conversation.prompts)}."]
    if echo:
        lines.append(f'You said: "{echo}".')
    for result in conversation.results:
        lines.append(f'{result.name} answered: "{result.text[:_QUOTED_RESULT]}".')
    return " ".join(lines)


def _recalled(recall: Directive, conversation: Conversation) -> str:
    assert isinstance(recall, Recall)
    if recall.what == "system":
        system = conversation.system[:_QUOTED_SYSTEM]
        return f'The system prompt begins: "{system}".' if system else "There is no system prompt."
    if recall.what == "tools":
        return f"The tools offered are: {', '.join(sorted(conversation.offered)) or 'none'}."
    number = int(recall.what)
    if number > len(conversation.prompts):
        return f"There is no prompt {number}: the conversation has {len(conversation.prompts)}."
    return f'Prompt {number} was: "{_shortened(conversation.prompts[number - 1], _QUOTED_PROMPT)}".'


def _shortened(text: str, limit: int = _QUOTED_ECHO) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _with_length(text: str, tokens: int) -> str:
    characters = tokens * TOKEN_CHARACTERS
    missing = characters - len(text)
    if missing <= 0:
        return text[:characters]
    lead = f"{text} " if text else ""
    return (lead + _FILLER * (missing // len(_FILLER) + 1))[:characters]


def _cut_at_stop_sequence(blocks: tuple[Block, ...], sequences: list[str]) -> tuple[tuple[Block, ...], str | None]:
    if not sequences or not blocks or not isinstance(blocks[0], Text):
        return blocks, None
    text = blocks[0].text
    found = [(text.find(sequence), sequence) for sequence in sequences if sequence and sequence in text]
    if not found:
        return blocks, None
    position, sequence = min(found)
    return ((Text(text[:position]),) if position else ()), sequence


def _truncated(blocks: tuple[Block, ...], most: int) -> tuple[tuple[Block, ...], int, bool]:
    """Truncate at `most` tokens; return the blocks, their tokens, and whether they are complete."""
    included: list[Block] = []
    used = 0
    for block in blocks:
        remaining = most - used
        content = block.text if isinstance(block, Text) else block.input
        size = tokens_of(content)
        if size <= remaining:
            included.append(block)
            used += size
            continue
        if remaining > 0:
            part = content[: remaining * TOKEN_CHARACTERS]
            included.append(Text(part) if isinstance(block, Text) else replace(block, input=part))
        return tuple(included), most, False
    return tuple(included), used, True


def _fault(step: _Step, conversation: Conversation, scope: str, defaults: Defaults, attempts: Attempts) -> Fault | None:
    """Return the fault of this request: limited faults in order until used up, then an unlimited one or none."""
    faults = [each for each in step.directives if isinstance(each, Fault)]
    key = f"{scope}\0{len(conversation.prompts)}\0{step.number}\0{conversation.prompt}"
    fault = _next_fault(faults, key, attempts)
    if fault is None and defaults.fault is not None:
        fault = _next_fault([defaults.fault], "flag", attempts)
    return fault


def _next_fault(faults: list[Fault], key: str, attempts: Attempts) -> Fault | None:
    attempt = attempts(key) if any(each.times is not None for each in faults) else 0
    for each in faults:
        if each.times is None or attempt <= each.times:
            return each
        attempt -= each.times
    return None


def tool_input(block: ToolUse) -> Any:
    """Return the input of a tool call as JSON; `{}` when `max_tokens` truncated it."""
    try:
        return json.loads(block.input)
    except ValueError:
        return {}
