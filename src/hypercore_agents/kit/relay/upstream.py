"""The upstream side of a relay: requests over pooled connections, and their responses in pieces.

Invariants:

- A request is repeated only if no byte of it can have arrived, that is, if the connection was refused. Before its first
  write, the socket of a pooled connection is checked for a close that the event loop has not processed yet; a closed
  connection is replaced.
- Every wait has a limit (`RequestLimits`), and every failure is a domain error that names the upstream.
- At most about two read buffers of a response are held in memory; then the upstream's socket is not read.

Rejected: repeating requests by HTTP method. A refused POST is safe to repeat; a PUT whose streamed body may have
arrived is not.
"""

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass

from multidict import CIMultiDict

from hypercore_agents.api.errors import AgentUnreachable, DeadlineExceeded, HypercoreError, PayloadTooLarge
from hypercore_agents.kit.relay.connection import Connection, InvalidResponse, RawHeaders, ResponseTimeout
from hypercore_agents.kit.relay.connection_pool import Origin, Pool
from hypercore_agents.kit.relay.delayed_calls import DelayedCalls
from hypercore_agents.kit.relay.request_head import request_head, split_url

_REFUSED_PAUSE = 0.05
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def unused_proxies(environment: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable that names a proxy. Connections never use a proxy."""
    return [
        f"{name} is not used: the gateway connects to the Claude API directly; allow that connection, or set "
        "CLAUDE_API_URL to the address of a relay"
        for name in sorted(environment)
        if name.upper() in _PROXIES and environment[name]
    ]


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request, in seconds and bytes. None: no limit.

    `connect` includes the wait for a free connection. `response` runs from then until the response's headers have
    arrived. `idle` is the longest pause within the response's body. `total` covers the whole request, slow clients
    included.
    """

    connect: float = 5.0
    response: float = 60.0
    idle: float = 60.0
    total: float | None = None
    request_bytes: int = 16 * 1024 * 1024
    response_bytes: int | None = None


@dataclass(frozen=True)
class Peer:
    """What error messages call the upstream, and the class of the errors for its failures."""

    name: str = "the agent"
    unreachable: Callable[[str], HypercoreError] = AgentUnreachable


class UpstreamResponse:
    """A response whose headers have arrived and whose body is read in pieces. Close it, read to the end or not."""

    __slots__ = (
        "_connection",
        "_limits",
        "_origin",
        "_peeked",
        "_peer",
        "_pool",
        "_received",
        "_upload",
        "event_stream",
        "raw_headers",
        "status",
    )

    def __init__(self, connection: Connection, pool: Pool, origin: Origin, limits: RequestLimits, peer: Peer) -> None:
        self.status = connection.status
        self.raw_headers: RawHeaders = connection.headers  # names in lower case
        self.event_stream = _content_type(connection.headers) == b"text/event-stream"
        self._connection: Connection | None = connection
        self._pool = pool
        self._origin = origin
        self._limits = limits
        self._peer = peer
        self._received = 0
        self._peeked = b""
        self._upload: asyncio.Task[None] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers by case-insensitive name."""
        return CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.raw_headers)

    @property
    def arrived(self) -> bool:
        """Whether the whole response has arrived, read or not."""
        return self._connection is None or self._connection.complete

    @property
    def at_end(self) -> bool:
        """Whether everything has been read. False does not exclude that the next read returns the end."""
        return not self._peeked and (self._connection is None or self._connection.at_end)

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last bytes of the body arrived; 0 while reading is paused."""
        return 0.0 if self._connection is None else self._connection.silent_seconds

    async def next_chunk(self) -> bytes:
        """Return what has arrived, at least one byte; empty at the end.

        Raises the peer's error if the response is cut off, DeadlineExceeded if nothing arrives for too long,
        PayloadTooLarge over the limit.
        """
        if self._peeked:
            peeked, self._peeked = self._peeked, b""
            return peeked
        if self._connection is None:
            return b""
        try:
            chunk = self._connection.take_buffered() or await self._connection.read()
        except ResponseTimeout:
            raise DeadlineExceeded(
                f"{self._peer.name} sent nothing for {self._limits.idle:g} s in the middle of its response"
            ) from None
        except (InvalidResponse, OSError):
            raise self._peer.unreachable(f"the response of {self._peer.name} was cut off") from None
        self._received += len(chunk)
        if self._limits.response_bytes is not None and self._received > self._limits.response_bytes:
            raise PayloadTooLarge(
                f"the response of {self._peer.name} is larger than {self._limits.response_bytes} bytes",
                details={"limit_bytes": self._limits.response_bytes},
            )
        return chunk

    def pipe(self, sink: Callable[[bytes], bool]) -> None:
        """Pass what arrives during a `next_chunk` to `sink`, which returns whether it accepted the bytes.

        `next_chunk` returns rejected bytes. A response with a limit in bytes is not piped.
        """
        if self._connection is not None and self._limits.response_bytes is None:
            self._connection.pipe(sink)

    async def peek(self, limit: int) -> bytes:
        """Return the body, or its beginning if it is longer than `limit` bytes; `next_chunk` returns it again.

        Raises as `next_chunk`.
        """
        pieces = bytearray()
        while len(pieces) <= limit and (chunk := await self.next_chunk()):
            pieces += chunk
        self._peeked = bytes(pieces)
        return self._peeked

    async def read(self, limit: int) -> bytes:
        """Return the whole body. Raises PayloadTooLarge if it is longer than `limit` bytes."""
        pieces = bytearray()
        while chunk := await self.next_chunk():
            pieces += chunk
            if len(pieces) > limit:
                raise PayloadTooLarge(f"the response of {self._peer.name} is larger than {limit} bytes")
        return bytes(pieces)

    def close(self) -> None:
        """Return the connection to the pool, which aborts it if the response is incomplete. Safe to repeat."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._upload is not None:
                _discard(self._upload)
            self._pool.give_back(self._origin, connection)

    def attach_upload(self, upload: "asyncio.Task[None]") -> None:
        """Take ownership of the task that is still sending the request's body."""
        self._upload = upload


class Upstream:
    """A client of one upstream, with a pool of connections that are opened on demand. Close it at the end.

    `connections` bounds how many are open (each is a descriptor). Idle ones close after `keep_alive` seconds, which
    must be less than the keep-alive time of the upstream.
    """

    def __init__(self, *, peer: Peer, limits: RequestLimits, connections: int = 8192, keep_alive: float = 30.0) -> None:
        self._peer = peer
        self._limits = limits
        self._pool = Pool(connections=connections, keep_alive=keep_alive)

    async def open(
        self,
        method: str,
        url: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        raw_headers: RawHeaders | None = None,
        body: bytes | AsyncIterator[bytes] | None = None,
        length: int | None = None,
        limits: RequestLimits | None = None,
    ) -> UpstreamResponse:
        """Send a request and return its response as soon as the headers have arrived. `url` is already encoded.

        `raw_headers`, in bytes, replace `headers`. `length` is that of a streamed body; None makes it chunked. Raises
        the peer's error, DeadlineExceeded, or what the body's iterator raised.
        """
        limits = limits or self._limits
        origin, target, host = split_url(url)
        if isinstance(body, bytes):
            length = len(body)
        if raw_headers is None:
            raw_headers = [(name.encode(), value.encode()) for name, value in headers]
        head = request_head(
            method, target, host, raw_headers, None if body is None else "chunked" if length is None else length
        )
        streamed = None if body is None or isinstance(body, bytes) else body
        upload: asyncio.Task[None] | None = None
        connection = self._pool.take_idle(origin) or await self._connect(origin, limits)
        try:
            connection.begin(
                head,
                body if isinstance(body, bytes) else None,
                head_only=method == "HEAD",
                body_follows=streamed is not None,
                response_timeout=limits.response,
                idle_timeout=limits.idle,
            )
            if streamed is not None:
                upload = asyncio.create_task(_send_body(connection, streamed, length is None), name="upstream.upload")
            await connection.wait_for_head()
        except BaseException as error:
            try:
                failure = await self._failure(error, upload, limits)
            finally:
                self._pool.give_back(origin, connection)
            if failure is error:
                raise
            raise failure from None
        response = UpstreamResponse(connection, self._pool, origin, limits, self._peer)
        if upload is not None:
            response.attach_upload(upload)
        return response

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the connections."""
        return self._pool.loop

    @functools.cached_property
    def delayed_calls(self) -> DelayedCalls:
        """Calls for requests that are not short."""
        return self._pool.delayed_calls

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()

    async def _failure(
        self, error: BaseException, upload: "asyncio.Task[None] | None", limits: RequestLimits
    ) -> BaseException:
        """Return the domain error for a failed request, and end its upload."""
        if upload is not None:
            if isinstance(error, OSError) and (failure := await _failure_of(upload)) is not None:
                return failure
            _discard(upload)
        if isinstance(error, ResponseTimeout):
            return DeadlineExceeded(f"{self._peer.name} did not answer within {limits.response:g} s")
        if isinstance(error, InvalidResponse):
            return self._peer.unreachable(f"{self._peer.name} sent an invalid HTTP response")
        if isinstance(error, OSError):
            return self._peer.unreachable(f"{self._peer.name} closed the connection without a response")
        return error

    async def _connect(self, origin: Origin, limits: RequestLimits) -> Connection:
        for last in (False, True):
            try:
                async with asyncio.timeout(limits.connect):
                    return await self._pool.connect(origin)
            except TimeoutError:
                raise self._not_reached(f" within {limits.connect:g} s") from None
            except (OSError, ssl.SSLError) as error:
                if last or not isinstance(error, ConnectionRefusedError):
                    raise self._not_reached() from None
            await asyncio.sleep(_REFUSED_PAUSE)
        raise AssertionError("the last attempt returns or raises")

    def _not_reached(self, within: str = "") -> HypercoreError:
        error = self._peer.unreachable(f"{self._peer.name} could not be reached{within}")
        error.details = {**(error.details or {}), "sent": False}
        return error


async def _send_body(connection: Connection, source: AsyncIterator[bytes], chunked: bool) -> None:
    """Send a streamed body. If the source fails, abort the connection so that the request cannot look complete."""
    try:
        async for piece in source:
            if piece and not await _sent(connection, b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece):
                return
        if not chunked or await _sent(connection, b"0\r\n\r\n"):
            connection.finish_request()
    except BaseException:
        connection.abort()
        raise


async def _sent(connection: Connection, piece: bytes) -> bool:
    """Send a piece; False if the connection is closed, which the reader of the response reports."""
    try:
        await connection.write(piece)
    except (OSError, InvalidResponse, ResponseTimeout):
        return False
    return True


def _discard(upload: "asyncio.Task[None]") -> None:
    """Cancel an upload whose result is not needed."""
    upload.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    upload.cancel()


async def _failure_of(upload: "asyncio.Task[None]") -> HypercoreError | None:
    upload.cancel()
    try:
        await asyncio.wait([upload])
    finally:
        failure = None if upload.cancelled() or not upload.done() else upload.exception()
    return failure if isinstance(failure, HypercoreError) else None


def _content_type(headers: RawHeaders) -> bytes:
    for name, value in headers:
        if name == b"content-type":
            return value.partition(b";")[0].strip().lower()
    return b""
