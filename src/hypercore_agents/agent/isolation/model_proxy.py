"""The model proxy: forwards model requests from a session's network namespace to the gateway.

It is the namespace's only way out. It serves a listening socket inside the namespace. Each connection to it gets its
own connection to the gateway. Requests are parsed strictly, one head at a time: method and path of one of the three
model routes, a body with a content-length, no trailers, upgrades or other framing. Any other request ends the
connection. So the gateway receives only checked requests, and a session cannot reach the gateway's internal routes.
Responses are forwarded as bytes.

The proxy adds the session's credential to each request. The credential does not exist inside the namespace, neither in
the CLI's environment nor in its memory. This also assigns a prewarmed CLI to its session, and renews the credential,
without the CLI.

Rejected: forwarding bytes unparsed (the gateway's internal routes share its port); a full HTTP proxy (two parsers that
may disagree, and work per token).
"""

import asyncio
import contextlib
import re
import socket
from urllib.parse import urlsplit

import structlog

from hypercore_agents.kit.aio.tasks import Tasks

_log = structlog.get_logger(__name__)
ROUTES = frozenset({("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"), ("GET", "/v1/models")})
_HEAD_BYTES = 64 * 1024
_BODY_BYTES = 64 * 1024 * 1024
_CHUNK = 64 * 1024
_CONNECTIONS = 32
"""Concurrent connections per session. The CLI holds a few; connections beyond the limit are closed at once."""
_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 900.0
_REQUEST_LINE = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.1")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
_REPLACED = frozenset({b"authorization", b"x-api-key", b"host", b"connection", b"proxy-authorization", b"expect"})
_REFUSED_HEADERS = frozenset({b"transfer-encoding", b"upgrade", b"trailer", b"te", b"keep-alive"})
_REFUSAL = b"""{"type": "error", "error": {"type": "permission_error",
"message": "only the model routes can be reached from here"}}"""


class Refused(Exception):
    """A request that is not forwarded."""


class ModelProxy:
    """Serves the listening socket of one CLI process. `token` is its session's credential, None until it has one."""

    def __init__(self, gateway_url: str, tasks: Tasks) -> None:
        parts = urlsplit(gateway_url)
        self.token: str | None = None
        self.session_id: str | None = None
        self._host = parts.hostname or "127.0.0.1"
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._authority = parts.netloc.rpartition("@")[2].encode()
        self._tasks = tasks
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Serve connections until `close`."""
        listener.setblocking(False)
        self._server = await asyncio.start_server(self._connection, sock=listener, limit=_HEAD_BYTES)

    def close(self) -> None:
        """Stop serving and abort every connection. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _CONNECTIONS or self._server is None:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        finally:
            self._open.discard(writer)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        responses: asyncio.Task[None] | None = None
        try:
            while True:
                async with asyncio.timeout(_IDLE_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                try:
                    forwarded, length = self._checked(head)
                except Refused as refusal:
                    _log.info("model_proxy.refused", reason=str(refusal))
                    if upstream is None:
                        await _refuse(writer)
                    return
                if upstream is None:
                    async with asyncio.timeout(_CONNECT_SECONDS):
                        source, upstream = await asyncio.open_connection(
                            self._host, self._port, ssl=self._tls or None, limit=_CHUNK
                        )
                    self._open.add(upstream)
                    responses = self._tasks.start("model-answers", _forward_responses(source, writer))
                upstream.write(forwarded)
                while length:
                    async with asyncio.timeout(_IDLE_SECONDS):
                        piece = await reader.read(min(length, _CHUNK))
                    if not piece:
                        return
                    length -= len(piece)
                    upstream.write(piece)
                    await upstream.drain()
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
        finally:
            if responses is not None:
                responses.cancel()
            if upstream is not None:
                self._open.discard(upstream)
                upstream.close()

    def _checked(self, head: bytes) -> tuple[bytes, int]:
        """Return the head to forward, with the credential, and the body's length. Raises Refused."""
        line, *fields = head[:-4].split(b"\r\n")
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            raise Refused("not an HTTP/1.1 request")
        method, target = match[1].decode(), match[2].decode()
        if (method, target.partition("?")[0]) not in ROUTES:
            raise Refused("not a model route")
        if self.token is None:
            raise Refused("the session has no credential yet")
        lines = [line, b"host: " + self._authority, b"authorization: Bearer " + self.token.encode()]
        if self.session_id is not None:
            lines.append(b"x-claude-code-session-id: " + self.session_id.encode())
        length: int | None = None
        for text in fields:
            header = _HEADER.fullmatch(text)
            if header is None:
                raise Refused("an invalid header")
            name = header[1].lower()
            if name in _REFUSED_HEADERS:
                raise Refused("a header that changes the framing")
            if name == b"content-length":
                if length is not None or re.fullmatch(rb"[0-9]{1,9}", header[2]) is None:
                    raise Refused("an invalid content-length")
                length = int(header[2])
            if name not in _REPLACED and not (self.session_id and name == b"x-claude-code-session-id"):
                lines.append(text)
        if (length or 0) > _BODY_BYTES or (method == "GET" and length):
            raise Refused("the body is too long")
        return b"\r\n".join(lines) + b"\r\n\r\n", length or 0


async def _forward_responses(source: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(_CHUNK):
            writer.write(piece)
            await writer.drain()
    # The gateway has ended its side.
    writer.close()


async def _refuse(writer: asyncio.StreamWriter) -> None:
    head = f"HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\ncontent-length: {len(_REFUSAL)}\r\n"
    writer.write(head.encode() + b"connection: close\r\n\r\n" + _REFUSAL)
    with contextlib.suppress(OSError):
        await writer.drain()
