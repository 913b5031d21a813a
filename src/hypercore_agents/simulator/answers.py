"""What is answered: a function of the conversation, the settings and how often this message was asked for before.

The unit of length is the token, and its rule is simple: one for every 4 characters begun (of a text, or of the JSON
of a tool's input). The same rule cuts an answer at `max_tokens`.
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
_BRIEF = 200
_QUOTED_RESULT = 4000
_QUOTED_SYSTEM = 500
_QUOTED_PROMPT = 2000
_FILLER = "This text goes on for as long as it was asked to, one word after another, and means nothing. "

Attempts = Callable[[str], int]
"""Counts: returns how often it has been called with this key, this time included."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What flags say about every answer; directives in a prompt go before them."""

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
    """A tool_use block; `input` is JSON, perhaps cut by `max_tokens`."""

    id: str
    name: str
    input: str


Block = Text | ToolUse


@dataclass(frozen=True, slots=True)
class Answer:
    """A message as it will be sent. `ttft` is in seconds, `rate` in tokens per second (0: all at once)."""

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
class _Part:
    """The directives that concern one message of the script, and the tool that ends it."""

    number: int
    said: tuple[Directive, ...]
    tool: CallTool | None


def tokens_of(text: str) -> int:
    """Return how many tokens a text has."""
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
    """Decide the answer.

    `identity` is a digest of the request, from which ids are made; `scope` (the CLI's session id, where there is
    one) keeps the counts of limited faults apart. Raises ApiFailure (400) for a malformed directive.
    """
    directives, plain = parse(conversation.prompt)
    part = _part(directives, conversation)
    blocks = _blocks(part, plain, conversation, defaults, identity)
    stop = next((each.reason for each in part.said if isinstance(each, Stop)), None)
    stop_reason = stop or ("tool_use" if any(isinstance(block, ToolUse) for block in blocks) else "end_turn")
    blocks, sequence = _stopped_at(blocks, request.stop_sequences)
    if sequence is not None:
        stop_reason = "stop_sequence"
    blocks, output_tokens, whole = _limited(blocks, request.max_tokens)
    if not whole:
        stop_reason, sequence = "max_tokens", None
    paced = _Pace(defaults, part.said)
    return Answer(
        id=f"msg_{identity[:24]}",
        model=request.model,
        blocks=blocks,
        stop_reason=stop_reason,
        stop_sequence=sequence,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache=paced.cache,
        ttft=paced.ttft,
        rate=paced.rate,
        fault=_fault(part, conversation, scope, defaults, attempts),
    )


class _Pace:
    """The last word on pace and cache, from the beginning of the script to the end of this message."""

    def __init__(self, defaults: Defaults, said: Iterable[Directive]) -> None:
        self.ttft = defaults.ttft
        self.rate = defaults.rate
        self.cache = Cache(0, 0)
        for each in said:
            match each:
                case FirstToken(seconds):
                    self.ttft = seconds
                case Rate(tokens_per_second):
                    self.rate = tokens_per_second
                case Cache():
                    self.cache = each


def _part(directives: tuple[Directive, ...], conversation: Conversation) -> _Part:
    """Return the part of the script that comes after the calls which already have results."""
    number = 0
    said: list[Directive] = []
    for each in directives:
        if not isinstance(each, CallTool):
            said.append(each)
        elif each.name not in conversation.offered:
            offered = ", ".join(sorted(conversation.offered)) or "none"
            said.append(Say(f"The tool {each.name} is not offered in this request (offered: {offered})."))
        elif number == len(conversation.results):
            return _Part(number, tuple(said), each)
        else:
            number += 1
            said = [kept for kept in said if isinstance(kept, FirstToken | Rate | Cache)]
    return _Part(number, tuple(said), None)


_ANSWER_TOOL = "StructuredOutput"
"""By this tool the Claude CLI has the model answer in the form of an output schema."""
_REMINDER = "[structured-output-enforce]"
"""How the CLI's prompt begins after an answer that did not use that tool; a scripted answer stays as it was."""


def _blocks(
    part: _Part, plain: str, conversation: Conversation, defaults: Defaults, identity: str
) -> tuple[Block, ...]:
    brief = _brief(plain)
    if conversation.schema is not None:
        return (Text(json.dumps(instance(conversation.schema, brief), ensure_ascii=False)),)
    tool = part.tool
    fresh = not part.said and not conversation.results and not brief.startswith(_REMINDER)
    if tool is None and fresh and _ANSWER_TOOL in conversation.offered:
        value = instance(conversation.offered[_ANSWER_TOOL], brief)
        tool = CallTool(_ANSWER_TOOL, value if isinstance(value, dict) else {})
    if tool is None and conversation.forced is not None and not conversation.results:
        name = conversation.forced or next(iter(conversation.offered), "")
        if name in conversation.offered:
            value = instance(conversation.offered[name] or {"type": "object"}, brief)
            tool = CallTool(name, value if isinstance(value, dict) else {})
    spoken = [each.text if isinstance(each, Say) else _recalled(each, conversation) for each in part.said
              if isinstance(each, Say | Recall)]  # fmt: skip
    text = "\n".join(spoken)
    length = next((each.count for each in part.said if isinstance(each, Tokens)), None)
    if not spoken and tool is None:
        text = _default(conversation, brief)
        length = length or defaults.tokens
    if length is not None:
        text = _of_length(text, length)
    blocks: list[Block] = [Text(text)] if text else []
    if tool is not None:
        blocks.append(ToolUse(f"toolu_{identity[-24:]}", tool.name, json.dumps(tool.input)))
    return tuple(blocks)


def _default(conversation: Conversation, brief: str) -> str:
    lines = [f"Turn {len(conversation.prompts)}."]
    if brief:
        lines.append(f'You said: "{brief}".')
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
    return f'Prompt {number} was: "{_brief(conversation.prompts[number - 1], _QUOTED_PROMPT)}".'


def _brief(text: str, limit: int = _BRIEF) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _of_length(text: str, tokens: int) -> str:
    characters = tokens * TOKEN_CHARACTERS
    missing = characters - len(text)
    if missing <= 0:
        return text[:characters]
    lead = f"{text} " if text else ""
    return (lead + _FILLER * (missing // len(_FILLER) + 1))[:characters]


def _stopped_at(blocks: tuple[Block, ...], sequences: list[str]) -> tuple[tuple[Block, ...], str | None]:
    if not sequences or not blocks or not isinstance(blocks[0], Text):
        return blocks, None
    text = blocks[0].text
    found = [(text.find(sequence), sequence) for sequence in sequences if sequence and sequence in text]
    if not found:
        return blocks, None
    position, sequence = min(found)
    return ((Text(text[:position]),) if position else ()), sequence


def _limited(blocks: tuple[Block, ...], most: int) -> tuple[tuple[Block, ...], int, bool]:
    """Cut at `most` tokens; returns the blocks, their tokens, and whether nothing was cut."""
    kept: list[Block] = []
    used = 0
    for block in blocks:
        room = most - used
        content = block.text if isinstance(block, Text) else block.input
        size = tokens_of(content)
        if size <= room:
            kept.append(block)
            used += size
            continue
        if room > 0:
            part = content[: room * TOKEN_CHARACTERS]
            kept.append(Text(part) if isinstance(block, Text) else replace(block, input=part))
        return tuple(kept), most, False
    return tuple(kept), used, True


def _fault(part: _Part, conversation: Conversation, scope: str, defaults: Defaults, attempts: Attempts) -> Fault | None:
    """Return the fault that this request meets: limited ones are used up in order, then nothing or an unlimited one."""
    faults = [each for each in part.said if isinstance(each, Fault)]
    key = f"{scope}\0{len(conversation.prompts)}\0{part.number}\0{conversation.prompt}"
    struck = _struck(faults, key, attempts)
    if struck is None and defaults.fault is not None:
        struck = _struck([defaults.fault], "flag", attempts)
    return struck


def _struck(faults: list[Fault], key: str, attempts: Attempts) -> Fault | None:
    attempt = attempts(key) if any(each.times is not None for each in faults) else 0
    for each in faults:
        if each.times is None or attempt <= each.times:
            return each
        attempt -= each.times
    return None


def tool_input(block: ToolUse) -> Any:
    """Return the input of a tool call as JSON; `{}` when `max_tokens` cut it."""
    try:
        return json.loads(block.input)
    except ValueError:
        return {}
