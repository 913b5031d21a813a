"""uvicorn's HTTP protocol, stricter: what two parsers could read in two ways is refused before any app sees it.

The parser (llhttp) refuses most of it by itself: two lengths, folded headers, bare line feeds. Added here:

- the error is in our shape, as every other one;
- a head has at most `HEAD_LIMIT` bytes, also while it is still arriving; httptools would keep any amount;
- a target is a path (or `*`): in absolute form it names a host beside the one in `Host` (RFC 9112 §3.2.2);
- `Upgrade` with a body: the parser takes the body for the other protocol's first bytes. Without one it is ignored (RFC
  9110 §7.8), but the connection ends with the answer, since the parser has stopped.

Rejected: h11, which is stricter by itself and takes several times as long per request.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.ids import new_request_id

HEAD_LIMIT = 64 * 1024
"""Longest head of a request, in bytes: request line and headers."""


class StrictProtocol(HttpToolsProtocol):
    """Pass it to uvicorn as `http`."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._in_head = True
        self._arrived = 0
        self._head = 0
        self._refusal: InvalidRequest | None = None

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._refusal is not None:
            return  # the connection is closing
        in_head = self._in_head
        super().data_received(data)
        if in_head and self._in_head and self._refusal is None:
            self._arrived += len(data)
            if self._arrived > HEAD_LIMIT:
                self._refusal = _too_long()
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True
        self._arrived = self._head = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is whole."""
        self._head += len(name) + len(value) + 4
        if self._head > HEAD_LIMIT:
            self._refuse(_too_long())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole. What is raised here, the parser turns into an error of its own."""
        self._in_head = False
        if not self.url.startswith(b"/") and self.url != b"*":
            self._refuse(InvalidRequest("the request's target must be a path", field="path"))
        upgrades = self.parser.should_upgrade()
        if upgrades and any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
            self._refuse(InvalidRequest("no other protocol is offered here; leave Upgrade out", field="Upgrade"))
        super().on_headers_complete()
        if upgrades:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, and close."""
        error = self._refusal or InvalidRequest("this is not a valid HTTP/1.1 request")
        self._refusal = error
        body = error.body(new_request_id()).model_dump_json(exclude_none=True).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _refuse(self, error: InvalidRequest) -> None:
        self._refusal = error
        raise error


def _too_long() -> InvalidRequest:
    return InvalidRequest(f"the request's head is longer than {HEAD_LIMIT} bytes", field="headers")
