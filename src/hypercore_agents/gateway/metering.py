"""Reading usage out of an answer of the Messages API while it passes.

Of a stream only the frames `message_start` and `message_delta` are parsed as JSON. Of the deltas, which are nearly
all of it, the bytes of text are counted, for the estimate of what a cut stream has produced. It counts what is not
ASCII by its bytes (`likely_tokens`).

What cannot be seen cannot be estimated: the API streams a summary of the model's thinking, or only its signature, and
bills the whole of it. A stream that has begun to think says so (`unseen`) until its usage came.

Uses of a tool that the API ran itself are billed by the piece. The usage at the end has their number; of an answer that
was cut before it, those count that the answer had shown (`server_tool_use` blocks).

Invariants: how the bytes are cut into chunks changes nothing; no number is believed beyond `MOST_TOKENS`.

Source of the numbers: the Messages API's `usage`. `message_start` has the input's, `message_delta` the output's so
far (cumulative), and the input's again where they changed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

_LINE_LIMIT = 1024 * 1024
_ANSWER_LIMIT = 16 * 1024 * 1024
CHARACTERS_PER_TOKEN = 4
MOST_TOKENS = 10_000_000
"""Ten times the largest context window there is."""
_MOST_UNITS, _MOST_ITERATIONS = 16, 1000
_ASCII = bytes(range(128))
_VISIBLE = re.compile(rb'"type"\s*:\s*"(?:text|tool_use)"')
_PRODUCED = re.compile(rb'"(?:text|partial_json|thinking)"\s*:\s*"')
_DELTA_TAIL = len('"}}')
_SERVER_TOOL = re.compile(rb'"type"\s*:\s*"server_tool_use"[^{}]{0,300}?"name"\s*:\s*"(\w{1,48})"')
"""A use of a tool of the API's in JSON. Inside a text, its quotes would be escaped."""


@dataclass
class Tokens:
    """Tokens of one request. `input` are those neither read from nor written to a cache.

    `cache_creation_1h` is the part of `cache_creation` that was written for an hour.
    """

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_creation: int = 0
    cache_creation_1h: int = 0
    server_tools: dict[str, int] = field(default_factory=dict)
    """Units of the tools that the API ran itself, by the API's names for them."""

    def take(self, usage: Any) -> None:
        """Take the numbers of a `usage` object; what it does not name, and what is no number, stays."""
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
            for name, count in list(units.items())[:_MOST_UNITS]:
                if number := _number(count, 0):
                    self.server_tools[str(name)[:64]] = number
        if isinstance(iterations := usage.get("iterations"), list):
            self._take_iterations(iterations[:_MOST_ITERATIONS])

    def _take_iterations(self, iterations: list[Any]) -> None:
        """Take the sums over a request's iterations where they are larger: the totals leave out compactions."""
        each = [iteration for iteration in iterations if isinstance(iteration, Mapping)]

        def total(name: str) -> int:
            return min(MOST_TOKENS, sum(_number(iteration.get(name), 0) for iteration in each))

        self.input = max(self.input, total("input_tokens"))
        self.output = max(self.output, total("output_tokens"))
        self.cache_read = max(self.cache_read, total("cache_read_input_tokens"))
        self.cache_creation = max(self.cache_creation, total("cache_creation_input_tokens"))


class Meter(Protocol):
    """Meters one answer.

    `started`: its usage has begun to show. `complete`: its end was seen, all usage with it. `failed`: the API
    ended it with an error of its own.
    """

    started: bool
    complete: bool
    failed: bool

    @property
    def unseen(self) -> bool:
        """Whether it has produced tokens that cannot be counted by what was seen, and has not told their number."""
        ...

    def feed(self, data: bytes) -> bool:
        """Take a chunk; return whether the answer's end is in it."""
        ...

    def tokens(self) -> Tokens:
        """Return what was used: by the API's numbers, or, of a cut answer, at least what was seen of it."""
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
        self._thinks = self._told = False

    @property
    def unseen(self) -> bool:
        """Whether it has produced tokens that cannot be counted by what was seen, and has not told their number."""
        return self._thinks and not self._told

    def feed(self, data: bytes) -> bool:
        """Take a chunk; return whether `message_stop` is in it."""
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
        """Return the usage; of a stream that has not told its output, at least what its text likely was."""
        if not self.complete and not self._told:
            likely = min(MOST_TOKENS, _tokens_of(self._ascii + self._skipped, self._other))
            self._tokens.output = max(self._tokens.output, likely)
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
                self._thinks = True  # a signature, or a kind of content that is not known here
                return
            size = max(0, len(line.rstrip()) - found.end() - _DELTA_TAIL)
            other = 0 if line.isascii() else len(line.translate(None, _ASCII))
            self._ascii += size - other
            self._other += other
        elif self._event == b"content_block_start":
            self._thinks = self._thinks or _VISIBLE.search(line) is None
            _count_uses(line, self._uses)
        elif self._event in (b"message_start", b"message_delta"):
            frame: Any = _parsed(line[5:])
            if self._event == b"message_start":
                self.started = True
                frame = frame.get("message")
            usage = frame.get("usage") if isinstance(frame, Mapping) else None
            self._tokens.take(usage)
            if self._event == b"message_delta" and isinstance(usage, Mapping) and "output_tokens" in usage:
                self._told = True


class JsonMeter:
    """Meters an answer that is one JSON object, read at its end."""

    def __init__(self) -> None:
        self.started = False
        self.complete = False
        self.failed = False
        self._body = bytearray()
        self._tokens = Tokens()

    def feed(self, data: bytes) -> bool:
        """Take a chunk. The end shows only by the connection's framing, or by the object being whole."""
        if len(self._body) <= _ANSWER_LIMIT:  # a longer one is no message, and is not kept
            self._body += data
        return False

    @property
    def unseen(self) -> bool:
        """Whether it has produced tokens that cannot be counted by what was seen, and has not told their number."""
        return not self.complete

    def tokens(self) -> Tokens:
        """Return the usage; of a cut answer, what its text likely was."""
        usage = _parsed(bytes(self._body)).get("usage")
        if isinstance(usage, Mapping):
            self.started = self.complete = True
            self._tokens.take(usage)
        else:
            self._tokens.output = min(MOST_TOKENS, likely_tokens(bytes(self._body)))
            self._tokens.server_tools.clear()  # this may be asked twice
            _count_uses(bytes(self._body), self._tokens.server_tools)
        return self._tokens


def _count_uses(shown: bytes, units: dict[str, int]) -> None:
    """Count the uses of the API's own tools in a piece of an answer, by the names that usage gives their units."""
    for name in _SERVER_TOOL.findall(shown):
        unit = f"{name.decode()}_requests"
        if unit in units or len(units) < _MOST_UNITS:
            units[unit] = min(MOST_TOKENS, units.get(unit, 0) + 1)


def likely_tokens(text: bytes) -> int:
    """Return how many tokens a text in UTF-8 likely is: one per four ASCII characters, one per two bytes of others (of
    Chinese, three tokens for two characters)."""
    other = 0 if text.isascii() else len(text.translate(None, _ASCII))
    return _tokens_of(len(text) - other, other)


def _tokens_of(ascii_bytes: int, other_bytes: int) -> int:
    return -(-ascii_bytes // CHARACTERS_PER_TOKEN) + -(-other_bytes // 2)


def usage_number(body: bytes, name: str) -> int | None:
    """Return a number of tokens out of a JSON object; None when it has none."""
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
    return min(value, MOST_TOKENS)
