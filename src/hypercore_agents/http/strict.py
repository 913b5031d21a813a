"""uvicorn's HTTP protocol with stricter parsing: ambiguous requests are refused before the app sees them.

The parser (llhttp) refuses most of them: two lengths, folded headers, bare line feeds. In addition:

- errors have the common error shape;
- a head has at most `HEAD_LIMIT` bytes, also while it is arriving; httptools would buffer any amount;
- the target is a path (or `*`). An absolute target names a second host (RFC 9112 §3.2.2). A fragment is not allowed in
  a target (§3.2), and servers disagree about whether it is part of the path;
- trailers of a chunked body are dropped: the parser reports them as headers, so they could override headers that were
  checked already (RFC 9110 §6.5);
- chunk extensions and trailers are bounded in relation to the size of their body;
- only HTTP/1.0 and HTTP/1.1 are accepted; the parser also accepts 2.0 and 0.9 in a request line;
- `Upgrade` is ignored (RFC 9110 §7.8). Java's client offers h2c by default, also with a body. The parser would take the
  following bytes for the other protocol, so a new parser reads the same head without `Upgrade` and continues.

Rejected: h11, which is stricter but takes several times as long per request.
"""

from typing import Any

import httptools

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.http.receive_timeouts import TimeoutProtocol

HEAD_LIMIT = 64 * 1024
"""Maximum size of a request's head, in bytes: request line and headers."""
_VERSIONS = frozenset(("1.0", "1.1"))
_FRAMING_PER_BYTE = 16
"""Allowed bytes of chunk framing per byte of the body; a chunk of one byte needs five."""
_UPGRADE_HEADERS = frozenset({b"upgrade", b"http2-settings"})
"""Headers, and tokens in `Connection`, that offer another protocol."""


class StrictProtocol(TimeoutProtocol):
    """Pass it to uvicorn as `http`."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._in_head = True
        self._head_ended = False
        self._received_of_head = 0
        self._header_bytes = 0
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
        # Bytes after a head that ended in this read belong to a body or to the next head; they do not count.
        if in_head and not self._head_ended and self._refusal is None:
            self._received_of_head += len(data)
            if self._received_of_head > HEAD_LIMIT:
                self._refusal = _too_long()
                self.send_400_response("")

    def _count_framing(self, arrived: int) -> None:
        """Refuse a body whose chunk extensions and trailer are too large for its content."""
        excess = self._framing_bytes + arrived - self._body_bytes * (1 + _FRAMING_PER_BYTE)
        self._framing_bytes = max(0, excess)
        if self._framing_bytes > HEAD_LIMIT:
            self._refusal = InvalidRequest(
                f"the chunk extensions and the trailer are longer than {HEAD_LIMIT} bytes", field="Transfer-Encoding"
            )
            self.send_400_response("")

    def _feed(self, data: bytes) -> None:
        """Parse the data as uvicorn does, except for `Upgrade`."""
        self._unset_keepalive_if_required()
        rest: bytes | memoryview = data
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    if not self._upgrades:
                        return  # CONNECT: no route supports it, and the connection ends with the response
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
                remaining = b", ".join(token for token in tokens if token.lower() not in _UPGRADE_HEADERS)
                lines.append(b"connection: %b" % remaining)
            elif name not in _UPGRADE_HEADERS:
                lines.append(b"%b: %b" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
        self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._upgrades = True, False
        self._received_of_head = self._header_bytes = self._framing_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A complete header, or a field of the trailer, which is dropped."""
        if not self._in_head:
            return
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > HEAD_LIMIT:
            self._refuse(_too_long())
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """The head is complete. The parser wraps exceptions raised here in its own."""
        self._in_head, self._head_ended = False, True
        if (version := self.parser.get_http_version()) not in _VERSIONS:
            self._refuse(InvalidRequest(f"HTTP/{version} is not supported; use HTTP/1.1", field="version"))
        if not self.url.startswith(b"/") and self.url != b"*":
            self._refuse(InvalidRequest("the request's target must be a path", field="path"))
        if b"#" in self.url:
            self._refuse(InvalidRequest("the request's target must have no fragment (#)", field="path"))
        if not self.parser.should_upgrade():
            super().on_headers_complete()
        elif self.parser.get_method() != b"CONNECT":
            self._upgrades = True  # the request begins when its head is parsed again
        else:
            super().on_headers_complete()
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """The request is complete, unless its head will be parsed again."""
        if not self._upgrades:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Send a 400 for invalid bytes, and close."""
        error = self._refusal or InvalidRequest("this is not a valid HTTP/1.1 request")
        self._refusal = error
        if self._response_pending():
            self.transport.close()
            return
        self.refuse(error)

    def _response_pending(self) -> bool:
        """Whether the next bytes sent belong to the response to another request, which a 400 would corrupt."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return bool(self.pipeline) or cycle.response_started or not cycle.more_body

    def _refuse(self, error: InvalidRequest) -> None:
        self._refusal = error
        raise error


def _too_long() -> InvalidRequest:
    return InvalidRequest(f"the request's head is longer than {HEAD_LIMIT} bytes", field="headers")
