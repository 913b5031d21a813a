"""The client's half of a relay: pooled connections to the other side, and one request's answer in pieces.

Invariants:

- A request is sent again only when no byte of it can have arrived: the connection was refused. A pooled connection
  is asked at its socket right before the first write whether the other side closed it, since a close that has not yet
  passed through the event loop is otherwise noticed only after the request is gone; a closed one is replaced.
- Every wait has a limit (`RequestLimits`), and every failure is a domain error that names the other side.
- At most about two read buffers of an answer wait in memory; then the other side's socket is not read.

Rejected: retrying by HTTP method (a POST that was refused is safe to send again, a PUT whose bytes may have arrived is
not, if its body was a stream).
"""

import asyncio
import functools
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from multidict import CIMultiDict

from hypercore_agents.api.errors import AgentUnreachable, DeadlineExceeded, HypercoreError, PayloadTooLarge
from hypercore_agents.kit.relay.connection import Connection, InvalidResponse, RawHeaders, ResponseTimeout
from hypercore_agents.kit.relay.connection_pool import Origin, Pool
from hypercore_agents.kit.relay.delayed_calls import DelayedCalls

_REFUSED_PAUSE = 0.05
_AUTHORITY = re.compile(r"((?:\[[0-9A-Fa-f:.]+\])|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_TARGET = re.compile(r"[!-~]+")
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def unused_proxies(environment: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable that names a proxy: connections go to their addresses directly."""
    return [
        f"{name} is not used: the gateway connects to the Claude API directly; allow that connection, or set "
        "CLAUDE_API_URL to the address of a relay"
        for name in sorted(environment)
        if name.upper() in _PROXIES and environment[name]
    ]


@dataclass(frozen=True)
class RequestLimits:
    """Seconds and bytes that one request may take. None: no limit of its own.

    `connect` includes the wait for a free connection; `answer` runs from then until the answer's headers are there;
    `idle` is the
    longest silence inside the answer's body; `total` covers everything, slow readers included.
    """

    connect: float = 5.0
    response: float = 60.0
    idle: float = 60.0
    total: float | None = None
    request_bytes: int = 16 * 1024 * 1024
    response_bytes: int | None = None


@dataclass(frozen=True)
class Peer:
    """How errors call the other side, and which error its failures are."""

    name: str = "the agent"
    unreachable: Callable[[str], HypercoreError] = AgentUnreachable


class UpstreamResponse:
    """An answer whose headers have arrived and whose body is read in pieces. Close it, read to the end or not."""

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
    def header(self) -> Mapping[str, str]:
        """The answer's headers by case-insensitive name."""
        return CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.raw_headers)

    @property
    def arrived(self) -> bool:
        """Whether the other side has sent everything, read or not."""
        return self._connection is None or self._connection.complete

    @property
    def at_end(self) -> bool:
        """Whether everything has been read, as far as is known: the end may also show only at the next read."""
        return not self._peeked and (self._connection is None or self._connection.at_end)

    @property
    def silent_seconds(self) -> float:
        """How long nothing has come of the body although it would be read."""
        return 0.0 if self._connection is None else self._connection.silent_seconds

    async def next(self) -> bytes:
        """Return what has arrived, at least one byte; empty at the end.

        Raises the side's error when it broke off, DeadlineExceeded when it is silent, PayloadTooLarge over the limit.
        """
        if self._peeked:
            peeked, self._peeked = self._peeked, b""
            return peeked
        if self._connection is None:
            return b""
        try:
            chunk = self._connection.arrived() or await self._connection.read()
        except ResponseTimeout:
            raise DeadlineExceeded(f"{self._peer.name} was silent for {self._limits.idle:g} s in mid-answer") from None
        except (InvalidResponse, OSError):
            raise self._peer.unreachable(f"{self._peer.name} broke off in mid-answer") from None
        self._received += len(chunk)
        if self._limits.response_bytes is not None and self._received > self._limits.response_bytes:
            raise PayloadTooLarge(
                f"the answer of {self._peer.name} is larger than {self._limits.response_bytes} bytes",
                details={"limit_bytes": self._limits.response_bytes},
            )
        return chunk

    def pipe(self, sink: Callable[[bytes], bool]) -> None:
        """Give what arrives while `next` waits to `sink`, which returns whether it took it; the rest `next` returns.

        An answer that is bounded in bytes is not piped.
        """
        if self._connection is not None and self._limits.response_bytes is None:
            self._connection.pipe(sink)

    async def peek(self, limit: int) -> bytes:
        """Return the body, or its beginning once that is longer than `limit` bytes; `next` returns it again.

        Raises as `next`.
        """
        pieces = bytearray()
        while len(pieces) <= limit and (chunk := await self.next()):
            pieces += chunk
        self._peeked = bytes(pieces)
        return self._peeked

    async def read(self, limit: int) -> bytes:
        """Return the whole body. Raises PayloadTooLarge when it is longer than `limit` bytes."""
        pieces = bytearray()
        while chunk := await self.next():
            pieces += chunk
            if len(pieces) > limit:
                raise PayloadTooLarge(f"the answer of {self._peer.name} is larger than {limit} bytes")
        return bytes(pieces)

    def close(self) -> None:
        """Give the connection back, or cut it when there is more to come. Safe to repeat."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._upload is not None:
                _forget(self._upload)
            self._pool.give_back(self._origin, connection)

    def uploading(self, upload: "asyncio.Task[None]") -> None:
        """Own the task that still sends the request's body."""
        self._upload = upload


class Upstream:
    """One pool of connections to the other side. Connections are opened at first use; close it at the end.

    `connections` bounds how many are open at once (each is a descriptor); idle ones close after `keep_alive` seconds,
    which must be less than the other side's patience.
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
        """Send a request and return its answer as soon as the headers are there. `url` is taken as it is encoded.

        `raw_headers`, in bytes, take the place of `headers`.
        `length` is that of a streamed body; None makes it chunked. Raises the side's error or DeadlineExceeded, or
        what the body's iterator raised.
        """
        limits = limits or self._limits
        origin, target, host = _split(url)
        if isinstance(body, bytes):
            length = len(body)
        if raw_headers is None:
            raw_headers = [(name.encode(), value.encode()) for name, value in headers]
        head = _head(
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
                more=streamed is not None,
                patience=limits.response,
                idle=limits.idle,
            )
            if streamed is not None:
                upload = asyncio.create_task(_send_body(connection, streamed, length is None), name="upstream.upload")
            await connection.answer()
        except BaseException as error:
            try:
                failure = await self._failure(error, upload, limits)
            finally:
                self._pool.give_back(origin, connection)
            if failure is error:
                raise
            raise failure from None
        answer = UpstreamResponse(connection, self._pool, origin, limits, self._peer)
        if upload is not None:
            answer.uploading(upload)
        return answer

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that the connections live in."""
        return self._pool.loop

    @functools.cached_property
    def lasting(self) -> DelayedCalls:
        """Calls for what lasts longer than a moment."""
        return self._pool.lasting

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()

    async def _failure(
        self, error: BaseException, upload: "asyncio.Task[None] | None", limits: RequestLimits
    ) -> BaseException:
        """Return how a request's failure is told, and end its upload."""
        if upload is not None:
            if isinstance(error, OSError) and (failure := await _failure_of(upload)) is not None:
                return failure
            _forget(upload)
        if isinstance(error, ResponseTimeout):
            return DeadlineExceeded(f"{self._peer.name} did not answer within {limits.response:g} s")
        if isinstance(error, InvalidResponse):
            return self._peer.unreachable(f"{self._peer.name} answered with broken HTTP")
        if isinstance(error, OSError):
            return self._peer.unreachable(f"{self._peer.name} closed the connection without an answer")
        return error

    async def _connect(self, origin: Origin, limits: RequestLimits) -> Connection:
        for last in (False, True):
            try:
                async with asyncio.timeout(limits.connect):
                    return await self._pool.connect(origin)
            except TimeoutError:
                raise self._not_reached(f" in {limits.connect:g} s") from None
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
    """Send a streamed body. A domain error of the source cuts the connection, so that the request cannot look whole."""
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
    """Send a piece; False when the other side closed: whether it had answered is told where the answer is read."""
    try:
        await connection.write(piece)
    except (OSError, InvalidResponse, ResponseTimeout):
        return False
    return True


def _forget(upload: "asyncio.Task[None]") -> None:
    """End an upload that nobody waits for any more; how it ended is nobody's news."""
    upload.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    upload.cancel()


async def _failure_of(upload: "asyncio.Task[None]") -> HypercoreError | None:
    upload.cancel()
    try:
        await asyncio.wait([upload])
    finally:
        failure = None if upload.cancelled() or not upload.done() else upload.exception()
    return failure if isinstance(failure, HypercoreError) else None


@functools.lru_cache(4096)
def _split(url: str) -> tuple[Origin, str, str]:
    """Return origin, request target and Host of an absolute URL. Raises ValueError: a defect of our own."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    origin, shown = _origin(scheme, authority)
    target = (slash + path).partition("#")[0] or "/"
    if _TARGET.fullmatch(target) is None:
        raise ValueError("not an absolute http or https URL in ASCII")
    return origin, target, shown


def _origin(scheme: str, authority: str) -> tuple[Origin, str]:
    found = _AUTHORITY.fullmatch(authority)
    if found is None or scheme not in ("http", "https"):
        raise ValueError("not an absolute http or https URL in ASCII")
    host, port = found.groups()
    secure = scheme == "https"
    number = int(port) if port else 443 if secure else 80
    shown = host if number == (443 if secure else 80) else f"{host}:{number}"
    return Origin(secure, host.strip("[]"), number), shown


def _head(
    method: str,
    target: str,
    host: str,
    headers: RawHeaders,
    length: int | Literal["chunked"] | None,
) -> bytes:
    lines = [f"{method} {target} HTTP/1.1\r\nHost: {host}".encode()]
    lines += [b": ".join(pair) for pair in headers]
    if length == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
    elif length is not None:
        lines.append(b"Content-Length: %d" % length)
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
        raise ValueError("a request's head has a line break or a null in it")
    return head + b"\r\n\r\n"


def _content_type(headers: RawHeaders) -> bytes:
    for name, value in headers:
        if name == b"content-type":
            return value.partition(b";")[0].strip().lower()
    return b""
