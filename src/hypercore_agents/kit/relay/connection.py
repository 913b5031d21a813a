"""One HTTP/1.1 connection to an upstream, as a bare asyncio protocol around llhttp (httptools).

Invariants:

- One request at a time. The states and their transitions are in `connection_state.py`. A connection is reused only
  after a whole request and a whole response that allows reuse; unexpected bytes close it.
- Received bytes are available at once (`read`). At most about `READ_BUFFER` bytes are buffered; then reading from the
  socket stops.
- Timeouts cost one timer per request, which compares the time of the last bytes, instead of one timer per chunk.
  Requests that end within `SHORT_REQUEST_SECONDS` cost none.

The two pause flags of asyncio's flow control (`_reading_paused`, `_writing_paused`) and `_request_sent` are not states:
they change independently of the response.

Rejected: aiohttp's client. It also handles redirects, cookies, tracing and decompression, which took two thirds of the
CPU time of a relayed request and of a relayed event (`benchmarks/relay.py`).
"""

import asyncio
import select
from collections.abc import Callable
from typing import Any, cast

import httptools

from hypercore_agents.kit.relay.connection_state import ConnectionState, IllegalTransition
from hypercore_agents.kit.relay.delayed_calls import DelayedCall, DelayedCalls

RawHeaders = list[tuple[bytes, bytes]]

READ_BUFFER = 128 * 1024
_HEAD_LIMIT = 64 * 1024
_FIELD_LIMIT = 16 * 1024
_WITHOUT_BODY = frozenset((204, 304))
_FRAMING = frozenset((b"content-length", b"transfer-encoding"))

# Module globals are looked up faster than members of an enum, and `data_received` runs for every chunk.
_CONNECTING = ConnectionState.CONNECTING
_IDLE = ConnectionState.IDLE
_AWAITING_HEAD = ConnectionState.AWAITING_HEAD
_RECEIVING = ConnectionState.RECEIVING
_RECEIVING_UNTIL_CLOSE = ConnectionState.RECEIVING_UNTIL_CLOSE
_COMPLETE = ConnectionState.COMPLETE
_COMPLETE_CLOSED = ConnectionState.COMPLETE_CLOSED
_CLOSED = ConnectionState.CLOSED


class InvalidResponse(Exception):
    """The upstream sent something that is not HTTP/1.1 or exceeds a limit of its head."""


class ResponseTimeout(Exception):
    """The upstream sent nothing for longer than the request allows."""


class Connection(asyncio.Protocol):
    """A connection to an upstream. Its methods raise OSError, InvalidResponse and ResponseTimeout.

    `status` and `headers` (names in lower case) are those of the last response. `idle_since` belongs to the pool:
    seconds of the event loop's clock.
    """

    __slots__ = (
        "_buffered",
        "_chunks",
        "_delayed_calls",
        "_error",
        "_framed",
        "_head_bytes",
        "_head_only",
        "_idle_timeout",
        "_last_received_at",
        "_loop",
        "_parser",
        "_poll",
        "_reader",
        "_reading_paused",
        "_request_sent",
        "_response_timeout",
        "_reuse_allowed",
        "_sink",
        "_timer",
        "_transport",
        "_writer",
        "_writing_paused",
        "headers",
        "idle_since",
        "state",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, delayed_calls: DelayedCalls) -> None:
        self.state = _CONNECTING
        self.status = 0
        self.headers: RawHeaders = []
        self.idle_since = 0.0
        self._loop = loop
        self._delayed_calls = delayed_calls
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None
        """Why the connection closed; set in both closed states."""
        self._head_only = False
        self._reuse_allowed = False
        self._request_sent = True
        self._framed = False
        self._head_bytes = 0
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._sink: Callable[[bytes], bool] | None = None
        self._reading_paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._response_timeout = self._idle_timeout = 0.0
        self._last_received_at = 0.0
        self._timer: asyncio.TimerHandle | DelayedCall | None = None
        self._poll = select.poll()
        self._parser: Any = httptools.HttpResponseParser(self)

    # -- for the pool and for requests --

    @property
    def reusable(self) -> bool:
        """Whether the next request may use this connection."""
        return self.state is _IDLE

    @property
    def complete(self) -> bool:
        """Whether the whole response has arrived, read or not."""
        state = self.state
        return state is _COMPLETE or state is _COMPLETE_CLOSED

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last bytes arrived; 0 while reading is paused and after the whole response."""
        return 0.0 if self._reading_paused or self.complete else self._loop.time() - self._last_received_at

    def is_stale(self) -> bool:
        """Return whether the upstream has closed this idle connection, even if the event loop has not noticed yet."""
        transport = self._transport
        if transport is None or transport.is_closing() or self.state is not _IDLE:
            return True
        return bool(self._poll.poll(0))  # nothing may be readable before a request

    def begin(
        self,
        head: bytes,
        body: bytes | None,
        *,
        head_only: bool,
        body_follows: bool,
        response_timeout: float,
        idle_timeout: float,
    ) -> None:
        """Send a request's head and `body`. With `body_follows`, call `write` and `finish_request` afterwards.

        Waiting raises ResponseTimeout when the response's headers have not arrived after `response_timeout` seconds,
        or when none of its body arrives for `idle_timeout` seconds while the socket is read. `head_only`: the request
        is a HEAD request. Raises OSError when the connection has been lost already.
        """
        transport = self._transport
        if self._error is not None or transport is None:
            raise self._error or ConnectionResetError("the connection is closed")
        self._change(_AWAITING_HEAD)
        self.status = self._head_bytes = 0
        self._head_only = head_only
        self._request_sent = not body_follows
        self._last_received_at = self._loop.time()
        self._response_timeout, self._idle_timeout = response_timeout, idle_timeout
        self._timer = self._delayed_calls.call(self._check_timeout)
        transport.write(head + body if body else head)

    async def write(self, piece: bytes) -> None:
        """Send a piece of the request's body; wait while the upstream does not read."""
        if self._error is not None or self._transport is None:
            raise ConnectionResetError("the connection is closed")
        self._transport.write(piece)
        if self._writing_paused:
            self._writer = self._loop.create_future()
            await self._writer

    def finish_request(self) -> None:
        """Record that the whole request body has been sent."""
        self._request_sent = True

    async def wait_for_head(self) -> None:
        """Return when status and headers of the final response have arrived."""
        while self.status < 200:
            if self._error is not None:
                raise self._error
            await self._next_event()

    async def read(self) -> bytes:
        """Return what has arrived of the body, at least one byte; empty at its end."""
        while not self._chunks:
            state = self.state
            if state is _COMPLETE or state is _COMPLETE_CLOSED:
                return b""
            if self._error is not None:
                raise self._error
            await self._next_event()
        return self.take_buffered()

    def take_buffered(self) -> bytes:
        """Return the buffered bytes of the body without waiting; empty if there are none."""
        chunks = self._chunks
        if not chunks:
            return b""
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._buffered = 0
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            self._last_received_at = self._loop.time()
            self._transport.resume_reading()
        return data

    def pipe(self, sink: Callable[[bytes], bool]) -> None:
        """Pass what arrives during a `read` to `sink`, which returns whether it accepted the bytes.

        `read` returns rejected bytes, the last bytes of the response, and what arrives outside of a `read`, so the
        order is preserved.
        """
        self._sink = sink

    @property
    def at_end(self) -> bool:
        """Whether the whole response has been read."""
        state = self.state
        return not self._chunks and (state is _COMPLETE or state is _COMPLETE_CLOSED)

    def release(self) -> bool:
        """End the request. Return whether the connection can serve another; otherwise it is aborted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sink = None
        if self.state is _COMPLETE and self._request_sent and self._reuse_allowed:
            self._change(_IDLE)
            if self._chunks:
                self._chunks, self._buffered = [], 0
            if self._reading_paused and self._transport is not None:
                self._reading_paused = False
                self._transport.resume_reading()
            return True
        self.abort()
        return False

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        self._close(ConnectionAbortedError("the connection was aborted"))

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        self._change(_IDLE)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        state = self.state
        if state is _RECEIVING or state is _RECEIVING_UNTIL_CLOSE:
            self._last_received_at = self._loop.time()
        elif state is _AWAITING_HEAD:
            self._head_bytes += len(data)
        else:
            self.abort()  # nothing was requested
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self._close(InvalidResponse(str(error)))
            self.abort()
        state = self.state
        if state is _AWAITING_HEAD and self._head_bytes > _HEAD_LIMIT:
            self._close(InvalidResponse(f"headers of more than {_HEAD_LIMIT} bytes"))
            self.abort()
            return
        if state is _RECEIVING or state is _RECEIVING_UNTIL_CLOSE:
            if self._sink is not None and self._reader is not None and not self._reader.done():
                chunks = self._chunks
                if not chunks:
                    return
                if self._sink(chunks[0] if len(chunks) == 1 else b"".join(chunks)):
                    self._chunks, self._buffered = [], 0
                    return
            if self._buffered > READ_BUFFER and not self._reading_paused and self._transport is not None:
                self._reading_paused = True
                self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self.state is _RECEIVING_UNTIL_CLOSE and error is None:
            self._change(_COMPLETE)
        self._transport = None
        self._close(error if isinstance(error, OSError) else ConnectionResetError("the connection was closed"))

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._writing_paused = False
        self._resume_writer()

    # -- callbacks of httptools --

    def on_message_begin(self) -> None:
        """A response begins, either interim or final."""
        if self.state is not _AWAITING_HEAD:
            raise InvalidResponse("more than one response")
        self.headers = []
        self._framed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header. Trailers, which follow the body, are dropped."""
        if len(name) + len(value) > _FIELD_LIMIT:
            raise InvalidResponse(f"a header of more than {_FIELD_LIMIT} bytes")
        if self.state is _AWAITING_HEAD:
            name = name.lower()
            if name in _FRAMING:
                self._framed = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Status and headers have arrived. Interim responses (RFC 9110 §15.2) are skipped."""
        self.status = status = self._parser.get_status_code()
        if status < 200:
            return
        self._last_received_at = self._loop.time()
        if self._head_only:
            self._reuse_allowed = False
            self._change(_COMPLETE)
        elif self._framed or status in _WITHOUT_BODY:
            self._reuse_allowed = self._parser.should_keep_alive()
            self._change(_RECEIVING)
        else:
            self._reuse_allowed = False
            self._change(_RECEIVING_UNTIL_CLOSE)

    def on_body(self, data: bytes) -> None:
        """Buffer a piece of the body."""
        self._chunks.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        """The response is complete, or an interim response has ended."""
        if self.state is _RECEIVING:
            self._change(_COMPLETE)

    # -- internal --

    def _change(self, state: ConnectionState) -> None:
        """Change the state. Every change goes through here."""
        if state not in self.state.following:
            raise IllegalTransition(self.state, state)
        self.state = state

    def _next_event(self) -> "asyncio.Future[None]":
        """Return a future that ends when bytes arrive or the connection closes."""
        self._reader = reader = self._loop.create_future()
        return reader

    def _wake(self) -> None:
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    def _resume_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and not writer.done():
            if self._error is not None:
                writer.set_exception(self._error)
            else:
                writer.set_result(None)

    def _close(self, error: Exception) -> None:
        """Enter a closed state, the first time, and wake both waiters."""
        if self._error is None:
            self._error = error
            self._change(_COMPLETE_CLOSED if self.state is _COMPLETE else _CLOSED)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()
        self._resume_writer()

    def _check_timeout(self) -> None:
        self._timer = None
        state = self.state
        if state is _AWAITING_HEAD:
            limit = self._response_timeout
        elif state is _RECEIVING or state is _RECEIVING_UNTIL_CLOSE:
            limit = self._idle_timeout
        else:
            return
        now = self._loop.time()
        if self._reading_paused:
            self._last_received_at = now
        remaining = self._last_received_at + limit - now
        if remaining <= 0:
            self._close(ResponseTimeout())
            self.abort()
        else:
            self._timer = self._loop.call_later(min(remaining, self._idle_timeout), self._check_timeout)
