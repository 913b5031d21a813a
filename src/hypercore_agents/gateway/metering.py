"""Meters the answers of the Messages API: reads their usage while they pass through.

Of a stream, only the frames `message_start` and `message_delta` are parsed as JSON. Of the deltas, which are almost all
of it, the bytes of text are counted, to estimate the output of a stream that is cut. Non-ASCII text counts by its bytes
(`estimated_tokens`).

Some output cannot be counted: the API streams a summary of the model's thinking, or only its signature, and bills all
of it. `uncounted` is true for a stream with such output until its usage arrives.

Uses of tools that the API runs itself are billed per use. The usage at the end has their number; for an answer that is
cut before, the `server_tool_use` blocks seen so far are counted.

Invariants: the result does not depend on how the bytes are split into chunks; no number above `MAX_TOKENS` is accepted.

Source of the numbers: the `usage` objects of the Messages API. `message_start` has those of the input, `message_delta`
the output so far (cumulative) and input numbers that changed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

_LINE_LIMIT = 1024 * 1024
_ANSWER_LIMIT = 16 * 1024 * 1024
CHARACTERS_PER_TOKEN = 4
MAX_TOKENS = 10_000_000
"""Ten times the largest context window."""
_MAX_UNITS, _MAX_ITERATIONS = 16, 1000
_ASCII = bytes(range(128))
_VISIBLE = re.compile(rb'"type"\s*:\s*"(?:text|tool_use)"')
_PRODUCED = re.compile(rb'"(?:text|partial_json|thinking)"\s*:\s*"')
_DELTA_TAIL = len('"}}')
_SERVER_TOOL = re.compile(rb'"type"\s*:\s*"server_tool_use"[^{}]{0,300}?"name"\s*:\s*"(\w{1,48})"')
"""A use of an API-run tool in JSON. Inside of a text, its quotes would be escaped."""


@dataclass
class Tokens:
    """Tokens of one request. `input` excludes tokens read from or written to a cache.

    `cache_creation_1h` is the part of `cache_creation` that is cached for an hour.
    """

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_creation: int = 0
    cache_creation_1h: int = 0
    server_tools: dict[str, int] = field(default_factory=dict)
    """Units of API-run tools, by the API's names for the units."""

    def take(self, usage: Any) -> None:
        """Take the numbers of a `usage` object; missing and invalid ones keep their values."""
        if not isinstance(usage, Mapping):
            return
        self.input = _number(usage.get("input_tokens"), self.input)
        self.output = _number(usage.get("output_tokens"), self.output)
        self.cache_read = _number(usage.get("cache_read_input_tokens"), self.cache_read)
        self.cache_creation = _number(usage.get("cache_creation_input_tokens"), self.cache_creation)
        if isinstance(split := usage.get("cache_creation"), Mapping):
            self.cache_creation_1h = _number(split.get("ephemeral_1h_input_tokens"), self.cache_creation_1h)
        self.cache_creation_1h = min(self.cache_creation_1h, self.cache_creation)
        if isinstance(units := usage.get("server_tool_use"), Mapping):
            for name, count in list(units.items())[:_MAX_UNITS]:
                if number := _number(count, 0):
                    self.server_tools[str(name)[:64]] = number
        if isinstance(iterations := usage.get("iterations"), list):
            self._take_iterations(iterations[:_MAX_ITERATIONS])

    def _take_iterations(self, iterations: list[Any]) -> None:
        """Take the sums over a request's iterations if they are larger: the totals exclude compactions."""
        each = [iteration for iteration in iterations if isinstance(iteration, Mapping)]

        def total(name: str) -> int:
            return min(MAX_TOKENS, sum(_number(iteration.get(name), 0) for iteration in each))

        self.input = max(self.input, total("input_tokens"))
        self.output = max(self.output, total("output_tokens"))
        self.cache_read = max(self.cache_read, total("cache_read_input_tokens"))
        self.cache_creation = max(self.cache_creation, total("cache_creation_input_tokens"))


class Meter(Protocol):
    """Meters one answer.

    `started`: the first usage has arrived. `complete`: the end has arrived, with all usage. `failed`: the API ended
    the answer with an error.
    """

    started: bool
    complete: bool
    failed: bool

    @property
    def uncounted(self) -> bool:
        """Whether it has output that cannot be counted from the stream, and whose usage has not arrived."""
        ...

    def feed(self, data: bytes) -> bool:
        """Take a chunk; return whether it contains the end of the answer."""
        ...

    def tokens(self) -> Tokens:
        """Return the usage: the API's numbers, or at least the output seen so far of an answer that was cut."""
        ...


class StreamMeter:
    """Meters a `text/event-stream`."""

    def __init__(self) -> None:
        self.complete = False
        self.failed = False
        self.started = False
        self._tokens = Tokens()
        self._event = b""
        self._partial = b""
        self._skipped = 0
        self._ascii = self._other = 0
        self._uses: dict[str, int] = {}
        self._has_hidden_output = self._output_reported = False

    @property
    def uncounted(self) -> bool:
        """Whether it has output that cannot be counted from the stream, and whose usage has not arrived."""
        return self._has_hidden_output and not self._output_reported

    def feed(self, data: bytes) -> bool:
        """Take a chunk; return whether it contains `message_stop`."""
        before = self.complete
        *lines, rest = data.split(b"\n")
        for line in lines:
            if self._skipped:
                self._ascii += self._skipped + len(line)
                self._skipped = 0
            else:
                self._line(self._partial + line)
            self._partial = b""
        if self._skipped:
            self._skipped += len(rest)
        else:
            self._partial += rest
            if len(self._partial) > _LINE_LIMIT:
                self._skipped, self._partial = len(self._partial), b""
        return self.complete and not before

    def tokens(self) -> Tokens:
        """Return the usage; without a reported output, at least an estimate from the text."""
        if not self.complete and not self._output_reported:
            estimate = min(MAX_TOKENS, _tokens_of(self._ascii + self._skipped, self._other))
            self._tokens.output = max(self._tokens.output, estimate)
            for unit, count in self._uses.items():
                self._tokens.server_tools[unit] = max(self._tokens.server_tools.get(unit, 0), count)
        return self._tokens

    def _line(self, line: bytes) -> None:
        if len(line) > _LINE_LIMIT:
            self._ascii += len(line)
        elif line.startswith(b"data:"):
            self._data(line)
        elif line.startswith(b"event:"):
            self._event = line[6:].strip()
            self.complete = self.complete or self._event == b"message_stop"
            self.failed = self.failed or self._event == b"error"
        elif not line.strip():
            self._event = b""

    def _data(self, line: bytes) -> None:
        if self._event == b"content_block_delta":
            if (found := _PRODUCED.search(line)) is None:
                self._has_hidden_output = True  # a signature, or an unknown type of content
                return
            size = max(0, len(line.rstrip()) - found.end() - _DELTA_TAIL)
            other = 0 if line.isascii() else len(line.translate(None, _ASCII))
            self._ascii += size - other
            self._other += other
        elif self._event == b"content_block_start":
            self._has_hidden_output = self._has_hidden_output or _VISIBLE.search(line) is None
            _count_uses(line, self._uses)
        elif self._event in (b"message_start", b"message_delta"):
            frame: Any = _parsed(line[5:])
            if self._event == b"message_start":
                self.started = True
                frame = frame.get("message")
            usage = frame.get("usage") if isinstance(frame, Mapping) else None
            self._tokens.take(usage)
            if self._event == b"message_delta" and isinstance(usage, Mapping) and "output_tokens" in usage:
                self._output_reported = True


class JsonMeter:
    """Meters an answer that is one JSON object, which is parsed at its end."""

    def __init__(self) -> None:
        self.started = False
        self.complete = False
        self.failed = False
        self._body = bytearray()
        self._tokens = Tokens()

    def feed(self, data: bytes) -> bool:
        """Take a chunk. Only HTTP's framing, or a complete object, shows the end."""
        if len(self._body) <= _ANSWER_LIMIT:  # a longer body is not a message
            self._body += data
        return False

    @property
    def uncounted(self) -> bool:
        """Whether it has output that cannot be counted from the stream, and whose usage has not arrived."""
        return not self.complete

    def tokens(self) -> Tokens:
        """Return the usage; of a cut answer, an estimate from its text."""
        usage = _parsed(bytes(self._body)).get("usage")
        if isinstance(usage, Mapping):
            self.started = self.complete = True
            self._tokens.take(usage)
        else:
            self._tokens.output = min(MAX_TOKENS, estimated_tokens(bytes(self._body)))
            self._tokens.server_tools.clear()  # this method may be called twice
            _count_uses(bytes(self._body), self._tokens.server_tools)
        return self._tokens


def _count_uses(shown: bytes, units: dict[str, int]) -> None:
    """Count the uses of API-run tools in a piece of an answer, by the names of their units in `usage`."""
    for name in _SERVER_TOOL.findall(shown):
        unit = f"{name.decode()}_requests"
        if unit in units or len(units) < _MAX_UNITS:
            units[unit] = min(MAX_TOKENS, units.get(unit, 0) + 1)


def estimated_tokens(text: bytes) -> int:
    """Estimate the tokens of a UTF-8 text: one per four ASCII characters, one per two bytes of other characters (so
    three tokens for two Chinese characters)."""
    other = 0 if text.isascii() else len(text.translate(None, _ASCII))
    return _tokens_of(len(text) - other, other)


def _tokens_of(ascii_bytes: int, other_bytes: int) -> int:
    return -(-ascii_bytes // CHARACTERS_PER_TOKEN) + -(-other_bytes // 2)


def usage_number(body: bytes, name: str) -> int | None:
    """Return a number of tokens from a field of a JSON object, None if it has none."""
    number = _number(_parsed(body).get(name), -1)
    return number if number >= 0 else None


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any, otherwise: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return otherwise
    return min(value, MAX_TOKENS)
