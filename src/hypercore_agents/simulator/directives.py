"""Parse directives: instructions to the simulator in a prompt, written as `[[name arguments]]`.

Only the names below are directives; any other double bracket (a shell test, a wiki link) is plain text. A directive
with wrong arguments is a 400 that states the right ones: a test with a misspelled fault must not pass by chance.

Tool calls divide a script into messages: `[[say A]] [[tool T {}]] [[fault 529]]` says A and calls T in its first
message and fails in the next one. The pace (`ttft`, `rate`) and `cache` apply from their position on; all other
directives apply only to their own message.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypercore_agents.simulator.failures import ERROR_TYPES, ApiFailure

STOP_REASONS = ("end_turn", "max_tokens", "refusal", "pause_turn", "model_context_window_exceeded")
CONNECTION_FAULTS = ("refuse", "cut", "hang")
MOST_TOKENS = 1_000_000
MOST_SECONDS = 3600.0
MOST_RATE = 1_000_000.0


@dataclass(frozen=True, slots=True)
class Say:
    """Answer with exactly this text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallTool:
    """Call this tool with this input if the request offers the tool."""

    name: str
    input: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recall:
    """Quote the conversation: the n-th prompt (from 1), `system`, or `tools`."""

    what: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Make the text exactly this many tokens long."""

    count: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Set the stop reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Wait this many seconds before the first token."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Stream this many tokens per second; 0 means without pacing."""

    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Cache:
    """Report these numbers of tokens as read from and written to the prompt cache."""

    read: int
    write: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Fail: `kind` is an HTTP status of the API, or `refuse`, `cut`, `hang`.

    `times` limits it to the first requests for this message (None: every request); `after` is the number of tokens sent
    before the failure; `retry_after` is in seconds, for 429.
    """

    kind: str
    times: int | None = None
    after: int = 0
    retry_after: float = 1.0

    @property
    def status(self) -> int | None:
        """The HTTP status, or None for a fault of the connection."""
        return int(self.kind) if self.kind.isdigit() else None


Directive = Say | CallTool | Recall | Tokens | Stop | FirstToken | Rate | Cache | Fault

_OPEN = re.compile(r"\[\[(say|tool|recall|ttft|rate|tokens|fault|stop|cache)(?=[\s\]])[ \t]*")
_TOOL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,127}")
_CLOSE = re.compile(r"\s*\]\]")
_DECODER = json.JSONDecoder()


def parse(text: str) -> tuple[tuple[Directive, ...], str]:
    """Return the directives in order and the text without them. Raises ApiFailure (400) for a malformed directive."""
    directives: list[Directive] = []
    plain: list[str] = []
    position = 0
    while opened := _OPEN.search(text, position):
        plain.append(text[position : opened.start()])
        name = opened.group(1)
        if name == "tool":
            directive, position = _tool(text, opened.end())
        else:
            end = text.find("]]", opened.end())
            if end < 0:
                raise _malformed(name, "unterminated; close it with ]]")
            directive, position = _READERS[name](text[opened.end() : end]), end + 2
        directives.append(directive)
    plain.append(text[position:])
    return tuple(directives), "".join(plain).strip()


def parse_fault(arguments: str) -> Fault:
    """Parse the arguments of `fault`: `KIND [times=N] [after=N] [retry_after=SECONDS]`. Raises ApiFailure (400)."""
    kind, *rest = arguments.split() or [""]
    if kind not in CONNECTION_FAULTS and not (kind.isdigit() and int(kind) in ERROR_TYPES):
        kinds = ", ".join([*map(str, ERROR_TYPES), *CONNECTION_FAULTS])
        raise _malformed("fault", f"the kind {kind!r} is not one of {kinds}")
    named = _named("fault", rest, ("times", "after", "retry_after"))
    after = named.get("after", "1" if kind == "cut" else "0")
    return Fault(
        kind=kind,
        times=int(_number("fault", named["times"], 1, 1_000_000, whole=True)) if "times" in named else None,
        after=int(_number("fault", after, 0, MOST_TOKENS, whole=True)),
        retry_after=_number("fault", named.get("retry_after", "1"), 0, MOST_SECONDS),
    )


def _tool(text: str, position: int) -> tuple[Directive, int]:
    name = _TOOL_NAME.match(text, position)
    if name is None:
        raise _malformed("tool", 'the name of a tool is missing, as in [[tool Read {"file_path": "a.txt"}]]')
    position = name.end()
    closed = _CLOSE.match(text, position)
    if closed is not None:
        return CallTool(name.group(), {}), closed.end()
    while position < len(text) and text[position].isspace():
        position += 1
    try:
        value, position = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise _malformed("tool", f"the input of {name.group()} is not JSON ({error})") from error
    closed = _CLOSE.match(text, position)
    if closed is None or not isinstance(value, dict):
        raise _malformed("tool", f"the input of {name.group()} must be one JSON object, followed by ]]")
    return CallTool(name.group(), value), closed.end()


def _recall(arguments: str) -> Recall:
    what = arguments.strip()
    if what not in ("system", "tools") and not (what.isascii() and what.isdigit() and 0 < int(what) < 1_000_000):
        raise _malformed("recall", f"{what!r} is not the number of a prompt (from 1), `system` or `tools`")
    return Recall(what)


def _stop(arguments: str) -> Stop:
    reason = arguments.strip()
    if reason not in STOP_REASONS:
        raise _malformed("stop", f"{reason!r} is not one of {', '.join(STOP_REASONS)}")
    return Stop(reason)


def _cache(arguments: str) -> Cache:
    named = _named("cache", arguments.split(), ("read", "write"))
    read, write = (
        int(_number("cache", named.get(part, "0"), 0, MOST_TOKENS, whole=True)) for part in ("read", "write")
    )
    return Cache(read, write)


_READERS: dict[str, Callable[[str], Directive]] = {
    "say": Say,
    "recall": _recall,
    "tokens": lambda arguments: Tokens(int(_number("tokens", arguments, 1, MOST_TOKENS, whole=True))),
    "stop": _stop,
    "ttft": lambda arguments: FirstToken(_number("ttft", arguments, 0, MOST_SECONDS)),
    "rate": lambda arguments: Rate(_number("rate", arguments, 0, MOST_RATE)),
    "cache": _cache,
    "fault": parse_fault,
}


def _named(directive: str, words: list[str], known: tuple[str, ...]) -> dict[str, str]:
    named = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or name not in known or name in named:
            raise _malformed(directive, f"{word!r} is not one of {', '.join(f'{each}=...' for each in known)}")
        named[name] = value
    return named


def _number(directive: str, text: str, least: float, most: float, *, whole: bool = False) -> float:
    try:
        value = float(int(text) if whole else float(text))
    except (ValueError, OverflowError):
        value = math.nan
    if not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise _malformed(directive, f"{text.strip()!r} is not {kind} from {least:g} to {most:g}")
    return value


def _malformed(directive: str, problem: str) -> ApiFailure:
    return ApiFailure(400, f"directive [[{directive}]]: {problem}")
