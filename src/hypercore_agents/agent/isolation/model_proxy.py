"""The one way out of a session's network namespace: from a listening socket inside it to the gateway's model routes.

Each connection from inside gets one of its own to the gateway. Requests are read strictly, one head at a time: a method
and path of the three model routes, a body of a said length, no trailers, upgrades or other framing; anything else ends
the connection. So what the gateway receives is what was checked here, and its internal routes cannot be reached from
inside. Answers pass as bytes.

The session's credential is put into each request here and exists nowhere inside: neither in the CLI's environment nor
in its memory. That also gives a prewarmed CLI its identity, and renews it, without a word to the CLI.

Rejected: bytes passed on unread (the gateway's internal routes share its port); a full HTTP proxy (two parsers that may
disagree, and work per token).
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
"""At a time and session: the CLI keeps a few, and what tools open beyond is closed at once."""
_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 900.0
_REQUEST_LINE = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.1")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
_REPLACED = frozenset({b"authorization", b"x-api-key", b"host", b"connection", b"proxy-authorization", b"expect"})
_REFUSED_HEADERS = frozenset({b"transfer-encoding", b"upgrade", b"trailer", b"te", b"keep-alive"})
_REFUSAL = b"""{"type": "error", "error": {"type": "permission_error",
"message": "only the model routes can be reached from here"}}"""


class Refused(Exception):
    """A request that does not pass."""


class ModelProxy:
    """Serves the listening socket of one session's process. `token` is its credential, None until it has one."""

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
        """Answer whoever connects, until `close`."""
        listener.setblocking(False)
        self._server = await asyncio.start_server(self._connection, sock=listener, limit=_HEAD_BYTES)

    def close(self) -> None:
        """Stop and cut every connection. Safe to repeat."""
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
        back: asyncio.Task[None] | None = None
        try:
            while True:
                async with asyncio.timeout(_IDLE_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                try:
                    passed, length = self._checked(head)
                except Refused as refusal:
                    _log.info("model_door.refused", reason=str(refusal))
                    if upstream is None:
                        await _refuse(writer)
                    return
                if upstream is None:
                    async with asyncio.timeout(_CONNECT_SECONDS):
                        source, upstream = await asyncio.open_connection(
                            self._host, self._port, ssl=self._tls or None, limit=_CHUNK
                        )
                    self._open.add(upstream)
                    back = self._tasks.start("model-answers", _pass_back(source, writer))
                upstream.write(passed)
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
            if back is not None:
                back.cancel()
            if upstream is not None:
                self._open.discard(upstream)
                upstream.close()

    def _checked(self, head: bytes) -> tuple[bytes, int]:
        """Return the head to pass on, with the credential, and the body's length. Raises Refused."""
        line, *fields = head[:-4].split(b"\r\n")
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            raise Refused("not a request of HTTP/1.1")
        method, target = match[1].decode(), match[2].decode()
        if (method, target.partition("?")[0]) not in ROUTES:
            raise Refused("not a model route")
        if self.token is None:
            raise Refused("no turn has begun")
        lines = [line, b"host: " + self._authority, b"authorization: Bearer " + self.token.encode()]
        if self.session_id is not None:
            lines.append(b"x-claude-code-session-id: " + self.session_id.encode())
        length: int | None = None
        for text in fields:
            header = _HEADER.fullmatch(text)
            if header is None:
                raise Refused("not a header")
            name = header[1].lower()
            if name in _REFUSED_HEADERS:
                raise Refused("a header that frames otherwise")
            if name == b"content-length":
                if length is not None or re.fullmatch(rb"[0-9]{1,9}", header[2]) is None:
                    raise Refused("not a length")
                length = int(header[2])
            if name not in _REPLACED and not (self.session_id and name == b"x-claude-code-session-id"):
                lines.append(text)
        if (length or 0) > _BODY_BYTES or (method == "GET" and length):
            raise Refused("a body too long")
        return b"\r\n".join(lines) + b"\r\n\r\n", length or 0


async def _pass_back(source: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(_CHUNK):
            writer.write(piece)
            await writer.drain()
    # The gateway has said its last: so have we.
    writer.close()


async def _refuse(writer: asyncio.StreamWriter) -> None:
    head = f"HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\ncontent-length: {len(_REFUSAL)}\r\n"
    writer.write(head.encode() + b"connection: close\r\n\r\n" + _REFUSAL)
    with contextlib.suppress(OSError):
        await writer.drain()
