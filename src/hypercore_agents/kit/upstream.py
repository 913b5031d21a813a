"""The client's half of a relay: pooled connections to the other side, and one request's answer in pieces.

Invariants:

- A request is sent again only when no byte of it can have arrived: the connection was refused, or a pooled
  connection turned out to be closed before anything was written to it. For the latter the socket is asked right
  before the first write, since a close that has not yet passed through the event loop is otherwise noticed only
  after the request is gone.
- Every wait has a limit (`Limits`), and every failure is a domain error that names the other side.
- At most about two read buffers (128 KB) of an answer wait in memory; then the other side's socket is not read.

Rejected: aiohttp's `total` and `sock_read` timeouts alone (one may wait minutes for an answer's first byte and
yet want to notice 60 s of silence inside it); retrying by HTTP method (a POST that was refused is safe to send again,
a PUT whose bytes may have arrived is not, if its body was a stream).
"""

import asyncio
import select
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload
from multidict import CIMultiDict
from yarl import URL

from hypercore_agents.api.errors import AgentUnreachable, DeadlineExceeded, HypercoreError, PayloadTooLarge
from hypercore_agents.kit.headers import RawHeaders

_READ_BUFFER = 64 * 1024
_WRITE_PIECE = 256 * 1024
_ATTEMPTS = 4
_REFUSED_PAUSE = 0.05
_HUNG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
_NOT_BY_ITSELF = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes that one request may take. None: no limit of its own.

    `connect` includes the wait for a free connection; `answer` runs until the answer's headers are there; `idle` is the
    longest silence inside the answer's body; `total` covers everything, slow readers included.
    """

    connect: float = 5.0
    answer: float = 60.0
    idle: float = 60.0
    total: float | None = None
    request_bytes: int = 16 * 1024 * 1024
    answer_bytes: int | None = None


@dataclass(frozen=True)
class Side:
    """How errors call the other side, and which error its failures are."""

    name: str = "the agent"
    unreachable: Callable[[str], HypercoreError] = AgentUnreachable


class Answer:
    """An answer whose headers have arrived and whose body is read in pieces. Close it, read to the end or not."""

    def __init__(self, response: aiohttp.ClientResponse, limits: Limits, side: Side) -> None:
        self.status = response.status
        self.raw_headers: RawHeaders = response.raw_headers
        self.event_stream = response.content_type == "text/event-stream"
        self._response = response
        self._content = response.content
        self._limits = limits
        self._side = side
        self._received = 0
        if response.connection is not None and response.connection.protocol is not None:
            response.connection.protocol.read_timeout = limits.idle
            response.connection.protocol.start_timeout()

    @property
    def header(self) -> Mapping[str, str]:
        """The answer's headers by case-insensitive name."""
        return self._response.headers

    @property
    def at_end(self) -> bool:
        """Whether everything has been read, as far as is known: the end may also show only at the next read."""
        return self._content.at_eof()

    async def next(self) -> bytes:
        """Return what has arrived, at least one byte; empty at the end.

        Raises the side's error when it broke off, DeadlineExceeded when it is silent, PayloadTooLarge over the limit.
        """
        try:
            chunk = await self._content.readany()
        except TimeoutError:
            raise DeadlineExceeded(f"{self._side.name} was silent for {self._limits.idle:g} s in mid-answer") from None
        except (aiohttp.ClientError, OSError):
            raise self._side.unreachable(f"{self._side.name} broke off in mid-answer") from None
        self._received += len(chunk)
        if self._limits.answer_bytes is not None and self._received > self._limits.answer_bytes:
            raise PayloadTooLarge(
                f"the answer of {self._side.name} is larger than {self._limits.answer_bytes} bytes",
                details={"limit_bytes": self._limits.answer_bytes},
            )
        return chunk

    async def read(self, limit: int) -> bytes:
        """Return the whole body. Raises PayloadTooLarge when it is longer than `limit` bytes."""
        pieces = bytearray()
        while chunk := await self.next():
            pieces += chunk
            if len(pieces) > limit:
                raise PayloadTooLarge(f"the answer of {self._side.name} is larger than {limit} bytes")
        return bytes(pieces)

    def close(self) -> None:
        """Give the connection back, or cut it when there is more to come."""
        self._response.close()


class Upstream:
    """One pool of connections to the other side. Connections are opened at first use; close it at the end.

    `connections` bounds how many are open at once (each is a descriptor); idle ones close after `keep_alive` seconds,
    which must be less than the other side's patience.
    """

    def __init__(self, *, side: Side, limits: Limits, connections: int = 8192, keep_alive: float = 30.0) -> None:
        self._side = side
        self._limits = limits
        self._connections = connections
        self._keep_alive = keep_alive
        self._session: aiohttp.ClientSession | None = None

    async def open(
        self,
        method: str,
        url: str,
        *,
        headers: CIMultiDict[str] | Iterable[tuple[str, str]] = (),
        body: bytes | AsyncIterator[bytes] | None = None,
        length: int | None = None,
        limits: Limits | None = None,
    ) -> Answer:
        """Send a request and return its answer as soon as the headers are there. `url` is taken as it is encoded.

        `length` is that of a streamed body; None makes it chunked. Raises the side's error or DeadlineExceeded, or
        what the body's iterator raised.
        """
        limits = limits or self._limits
        try:
            async with asyncio.timeout(limits.answer):
                return await self._send(method, URL(url, encoded=True), CIMultiDict(headers), body, length, limits)
        except TimeoutError:
            raise DeadlineExceeded(f"{self._side.name} did not answer within {limits.answer:g} s") from None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def _send(
        self,
        method: str,
        url: URL,
        headers: CIMultiDict[str],
        source: bytes | AsyncIterator[bytes] | None,
        length: int | None,
        limits: Limits,
    ) -> Answer:
        if isinstance(source, bytes):
            length = len(source)
        if source is not None and length is not None:
            headers["Content-Length"] = str(length)
        timeout = aiohttp.ClientTimeout(total=None, connect=limits.connect)
        for attempt in range(1, _ATTEMPTS + 1):
            body = None if source is None or length == 0 else _Body(source, length)
            try:
                response = await self._pool().request(
                    method, url, headers=headers, data=body, allow_redirects=False, timeout=timeout
                )
                return Answer(response, limits, self._side)
            except aiohttp.ConnectionTimeoutError:
                raise self._side.unreachable(
                    f"{self._side.name} could not be reached in {limits.connect:g} s"
                ) from None
            except aiohttp.ClientConnectorError as error:
                if attempt > 1 or not isinstance(error.os_error, ConnectionRefusedError):
                    raise self._side.unreachable(f"{self._side.name} could not be reached") from None
                await asyncio.sleep(_REFUSED_PAUSE)
            except (aiohttp.ClientError, OSError) as error:
                if body is not None and body.failure is not None:
                    raise body.failure from None
                if body is None or body.touched or attempt == _ATTEMPTS:
                    if isinstance(error, aiohttp.ClientResponseError):
                        raise self._side.unreachable(f"{self._side.name} answered with broken HTTP") from None
                    raise self._side.unreachable(f"{self._side.name} closed the connection without an answer") from None
        raise AssertionError("the last attempt returns or raises")

    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self._connections, keepalive_timeout=self._keep_alive, ttl_dns_cache=60
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=_READ_BUFFER,
                skip_auto_headers=_NOT_BY_ITSELF,
                max_line_size=16 * 1024,
                max_field_size=16 * 1024,
            )
        return self._session


class _Body(Payload):
    """A request's body that knows whether any byte of the request can have left this process."""

    _autoclose = True

    def __init__(self, source: bytes | AsyncIterator[bytes], length: int | None) -> None:
        super().__init__(source)
        self._size = length
        self.touched = False
        self.failure: HypercoreError | None = None

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("a relayed body is bytes")

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Write head and body; the head leaves with the first piece (aiohttp buffers it until then)."""
        if _hung_up(getattr(writer, "transport", None)):
            raise ConnectionResetError("the pooled connection was closed by the other side")
        self.touched = self._consumed = True
        if isinstance(self._value, bytes):
            for start in range(0, len(self._value), _WRITE_PIECE):
                await writer.write(self._value[start : start + _WRITE_PIECE])
            return
        try:
            async for piece in self._value:
                await writer.write(piece)
        except HypercoreError as error:
            self.failure = error
            raise


def _hung_up(transport: Any) -> bool:
    if transport is None or transport.is_closing():
        return True
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), getattr(select, "POLLRDHUP", 0))
    return any(events & _HUNG_UP for _, events in poll.poll(0))
