"""uvicorn's HTTP protocol, stricter: what two parsers could read in two ways is refused before any app sees it.

The parser (llhttp) refuses most of it by itself: two lengths, folded headers, bare line feeds. Added here:

- the error is in our shape, as every other one;
- a head has at most `HEAD_LIMIT` bytes, also while it is still arriving; httptools would keep any amount;
- a target is a path (or `*`): in absolute form it names a host beside the one in `Host` (RFC 9112 §3.2.2), and with a
  fragment, which no target has (§3.2), some take it for a part of the path and some cut it off;
- fields after the head of a request (the trailer of a chunked body) are dropped: the parser reports them as headers,
  and what was checked in the head would be decided again by what follows it (RFC 9110, 6.5);
- chunk extensions and trailers together are bounded in relation to the body that they come with;
- only HTTP/1.0 and HTTP/1.1 are served: the parser also accepts 2.0 and 0.9 in a request line;
- `Upgrade` is ignored (RFC 9110 §7.8): Java's client offers h2c by default, also with a body. The parser would take
  what follows for the other protocol's bytes, so a new one reads the same head without it, and goes on.

Rejected: h11, which is stricter by itself and takes several times as long per request.
"""

from typing import Any

import httptools

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.http.receive_timeouts import TimeoutProtocol

HEAD_LIMIT = 64 * 1024
"""Longest head of a request, in bytes: request line and headers."""
_VERSIONS = frozenset(("1.0", "1.1"))
_FRAMING_PER_BYTE = 16
"""Bytes of chunk framing that each byte of the body allows: a chunk of one byte takes five."""
_OFFERING = frozenset({b"upgrade", b"http2-settings"})
"""Headers, and words in `Connection`, by which a client offers another protocol."""


class StrictProtocol(TimeoutProtocol):
    """Pass it to uvicorn as `http`."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._in_head = True
        self._head_ended = False
        self._arrived = 0
        self._head = 0
        self._upgrades = False
        self._refusal: InvalidRequest | None = None
        self._body_bytes = 0
        self._framing_bytes = 0

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._refusal is not None:
            return  # the connection is closing
        in_head, self._head_ended = self._in_head, False
        self._body_bytes = 0
        self._feed(data)
        if not in_head and not self._in_head and not self._head_ended and self._refusal is None:
            self._count_framing(len(data))
        # A head that ended in this read was followed by a body, which counts for no head, and maybe by the next head.
        if in_head and not self._head_ended and self._refusal is None:
            self._arrived += len(data)
            if self._arrived > HEAD_LIMIT:
                self._refusal = _too_long()
                self.send_400_response("")

    def _count_framing(self, arrived: int) -> None:
        """Refuse a body whose chunk extensions and trailer outweigh its content."""
        excess = self._framing_bytes + arrived - self._body_bytes * (1 + _FRAMING_PER_BYTE)
        self._framing_bytes = max(0, excess)
        if self._framing_bytes > HEAD_LIMIT:
            self._refusal = InvalidRequest(
                f"the chunk extensions and the trailer are longer than {HEAD_LIMIT} bytes", field="Transfer-Encoding"
            )
            self.send_400_response("")

    def _feed(self, data: bytes) -> None:
        """Have the data parsed, as uvicorn does but for `Upgrade`."""
        self._unset_keepalive_if_required()
        rest: bytes | memoryview = data
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    if not self._upgrades:
                        return  # CONNECT: no route has it, and the connection ends with the answer
                    rest = memoryview(rest)[upgrade.args[0] :]
                    self._read_without_upgrade()
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("")

    def _read_without_upgrade(self) -> None:
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                kept = b", ".join(token for token in tokens if token.lower() not in _OFFERING)
                lines.append(b"connection: %b" % kept)
            elif name not in _OFFERING:
                lines.append(b"%b: %b" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._upgrades = True, False
        self._arrived = self._head = self._framing_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is whole, or a field of the trailer, which is dropped."""
        if not self._in_head:
            return
        self._head += len(name) + len(value) + 4
        if self._head > HEAD_LIMIT:
            self._refuse(_too_long())
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """The head is whole. What is raised here, the parser turns into an error of its own."""
        self._in_head, self._head_ended = False, True
        if (version := self.parser.get_http_version()) not in _VERSIONS:
            self._refuse(InvalidRequest(f"HTTP/{version} is not served here; use HTTP/1.1", field="version"))
        if not self.url.startswith(b"/") and self.url != b"*":
            self._refuse(InvalidRequest("the request's target must be a path", field="path"))
        if b"#" in self.url:
            self._refuse(InvalidRequest("the request's target must have no fragment (#)", field="path"))
        if not self.parser.should_upgrade():
            super().on_headers_complete()
        elif self.parser.get_method() != b"CONNECT":
            self._upgrades = True  # the request begins when its head is read once more
        else:
            super().on_headers_complete()
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """A request is whole; not one whose head will be read once more."""
        if not self._upgrades:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, and close."""
        error = self._refusal or InvalidRequest("this is not a valid HTTP/1.1 request")
        self._refusal = error
        if self._answers_another():
            self.transport.close()
            return
        self.refuse(error)

    def _answers_another(self) -> bool:
        """Whether the next bytes belong to another request's answer: a 400 would be taken for a part of it."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return bool(self.pipeline) or cycle.response_started or not cycle.more_body

    def _refuse(self, error: InvalidRequest) -> None:
        self._refusal = error
        raise error


def _too_long() -> InvalidRequest:
    return InvalidRequest(f"the request's head is longer than {HEAD_LIMIT} bytes", field="headers")
