"""One HTTP/1.1 connection to the other side of a relay, as a bare asyncio protocol around llhttp (httptools).

Invariants:

- One request at a time. A connection is `reusable` only after an answer that was whole, whose request was whole, and
  that let the connection live; whatever arrives unasked makes it unusable.
- What has arrived is handed out at once (`read`); at most about `READ_BUFFER` bytes wait, then the socket is not read.
- Silence is measured by one timer a request that looks at the time of the last bytes, not by a timer per chunk,
  and by none for a request that is over in a moment.

Rejected: aiohttp's client here. It does all this and much more (redirects, cookies, tracing, decompression), and that
more was two thirds of a relayed request's CPU and of a relayed event's (`benchmarks/relay.py`).
"""

import asyncio
import select
from collections.abc import Callable
from typing import Any, cast

import httptools

from hypercore_agents.kit.relay.delayed_calls import Call, DelayedCalls

RawHeaders = list[tuple[bytes, bytes]]

READ_BUFFER = 128 * 1024
_HEAD_LIMIT = 64 * 1024
_FIELD_LIMIT = 16 * 1024
_WITHOUT_BODY = frozenset((204, 304))
_FRAMING = frozenset((b"content-length", b"transfer-encoding"))


class InvalidResponse(Exception):
    """What came is not HTTP as we accept it."""


class ResponseTimeout(Exception):
    """Nothing came for as long as was allowed."""


class Connection(asyncio.Protocol):
    """A connection; `loop` is the running one. Raises OSError kinds, InvalidResponse and ResponseTimeout.

    `headers` are those of the last answer, with names in lower case.
    """

    __slots__ = (
        "_buffered",
        "_busy",
        "_chunks",
        "_closed",
        "_framed",
        "_head",
        "_head_bytes",
        "_head_only",
        "_heard_at",
        "_idle",
        "_keeps_alive",
        "_lasting",
        "_loop",
        "_parser",
        "_patience",
        "_paused",
        "_poll",
        "_reader",
        "_sink",
        "_timer",
        "_transport",
        "_until_close",
        "_uploaded",
        "_writer",
        "_writing_paused",
        "complete",
        "headers",
        "idle_since",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, lasting: DelayedCalls) -> None:
        self.status = 0
        self.headers: RawHeaders = []
        self.complete = False
        self.idle_since = 0.0
        """Seconds of the event loop's clock; the pool's note."""
        self._loop = loop
        self._lasting = lasting
        self._transport: asyncio.Transport | None = None
        self._closed: Exception | None = None
        self._busy = False
        self._head_only = False
        self._until_close = False
        self._keeps_alive = False
        self._uploaded = True
        self._head = self._framed = False
        self._head_bytes = 0
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._sink: Callable[[bytes], bool] | None = None
        self._paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._patience = self._idle = 0.0
        self._heard_at = 0.0
        self._timer: asyncio.TimerHandle | Call | None = None
        self._poll = select.poll()
        self._parser: Any = httptools.HttpResponseParser(self)

    # -- what the pool and the request ask --

    @property
    def reusable(self) -> bool:
        """Whether the next request may go here."""
        return self._closed is None and not self._busy and self._transport is not None

    @property
    def silent_seconds(self) -> float:
        """How long nothing has come although it would be read."""
        return 0.0 if self._paused or self.complete else self._loop.time() - self._heard_at

    def is_stale(self) -> bool:
        """Ask the socket whether the other side hung up and the event loop has not heard of it yet."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._closed is not None:
            return True
        return bool(self._poll.poll(0))  # nothing may be readable before a request

    def begin(
        self, head: bytes, body: bytes | None, *, head_only: bool, more: bool, patience: float, idle: float
    ) -> None:
        """Send a request's head and the body that is at hand. With `more`, `write` and `finish_request` follow.

        Silence comes when the answer's headers are not there after `patience` seconds, and when nothing arrives of its
        body for `idle` seconds although it would be read.
        """
        self.status, self.headers, self.complete = 0, [], False
        self._head = self._until_close = self._framed = False
        self._head_bytes = 0
        self._busy = True
        self._head_only = head_only
        self._uploaded = not more
        self._heard_at = self._loop.time()
        self._patience, self._idle = patience, idle
        self._timer = self._lasting.call(self._look)
        assert self._transport is not None
        self._transport.write(head + body if body else head)

    async def write(self, piece: bytes) -> None:
        """Send a piece of the request's body; waits while the other side does not take it."""
        if self._closed is not None or self._transport is None:
            raise ConnectionResetError("the connection is closed")
        self._transport.write(piece)
        if self._writing_paused:
            self._writer = self._loop.create_future()
            await self._writer

    def finish_request(self) -> None:
        """Note that the request's body was sent as a whole."""
        self._uploaded = True

    async def answer(self) -> None:
        """Return when the final answer's status and headers are there."""
        while not self._head:
            if self._closed is not None:
                raise self._closed
            await self._news()

    async def read(self) -> bytes:
        """Return what has arrived of the body, at least one byte; empty at its end."""
        while not self._chunks:
            if self.complete:
                return b""
            if self._closed is not None:
                raise self._closed
            await self._news()
        return self.arrived()

    def arrived(self) -> bytes:
        """Return what has arrived of the body by now, empty for nothing."""
        chunks = self._chunks
        if not chunks:
            return b""
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._heard_at = self._loop.time()
            self._transport.resume_reading()
        return data

    def pipe(self, sink: Callable[[bytes], bool]) -> None:
        """Give what arrives while `read` waits to `sink`, which returns whether it took it.

        What it did not take, and whatever comes with the answer's end, `read` returns as ever; so does what arrives
        while nobody reads, so that nothing overtakes.
        """
        self._sink = sink

    @property
    def at_end(self) -> bool:
        """Whether the whole answer has been read."""
        return self.complete and not self._chunks

    def release(self) -> bool:
        """Let go of the request; return whether the connection can serve another, else it is cut."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sink = None
        whole = self.complete and self._uploaded and self._closed is None and not self._head_only
        if whole and self._keeps_alive and not self._until_close:
            self._busy = False
            self._chunks, self._buffered = [], 0
            if self._paused and self._transport is not None:
                self._paused = False
                self._transport.resume_reading()
            return True
        self.abort()
        return False

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()
        self._fail(ConnectionAbortedError("the connection was cut here"))

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not self._busy or self.complete:
            self.abort()  # nobody asked for this
            return
        if self._head:
            self._heard_at = self._loop.time()
        else:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self._fail(InvalidResponse(str(error)))
            if self._transport is not None:
                self._transport.abort()
        if not self._head and self._head_bytes > _HEAD_LIMIT:
            self._fail(InvalidResponse(f"headers of more than {_HEAD_LIMIT} bytes"))
            self.abort()
        if self._sink is not None and self._reader is not None and not self._reader.done() and not self.complete:
            chunks = self._chunks
            if not chunks and self._closed is None:
                return
            if self._closed is None and self._sink(chunks[0] if len(chunks) == 1 else b"".join(chunks)):
                self._chunks, self._buffered = [], 0
                return
        if self._buffered > READ_BUFFER and not self._paused and not self.complete and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._until_close and self._head and error is None and self._closed is None:
            self.complete = True
        self._transport = None
        self._fail(error if isinstance(error, OSError) else ConnectionResetError("the connection was closed"))

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._writing_paused = False
        self._resume_writer()

    # -- httptools' callbacks --

    def on_message_begin(self) -> None:
        """An answer begins; after an interim one, the next."""
        if self.complete:
            raise InvalidResponse("more than one answer")
        self.headers = []
        self._framed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; after the body, a trailer, which is dropped."""
        if len(name) + len(value) > _FIELD_LIMIT:
            raise InvalidResponse(f"a header of more than {_FIELD_LIMIT} bytes")
        if not self._head:
            name = name.lower()
            if name in _FRAMING:
                self._framed = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Status and headers are there, unless the answer is an interim one (RFC 9110 §15.2)."""
        self.status = self._parser.get_status_code()
        if self.status < 200:
            return
        self._head = True
        self._heard_at = self._loop.time()
        self._keeps_alive = self._parser.should_keep_alive()
        if self._head_only:
            self.complete = True
            return
        self._until_close = not self._framed and self.status not in _WITHOUT_BODY

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._chunks.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        """The answer is whole, or an interim one is over."""
        if self._head:
            self.complete = True

    # -- inside --

    def _news(self) -> "asyncio.Future[None]":
        """What is to come with whatever arrives next."""
        self._reader = reader = self._loop.create_future()
        return reader

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    def _resume_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and not writer.done():
            if self._closed is not None:
                writer.set_exception(self._closed)
            else:
                writer.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._closed is None:
            self._closed = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()
        self._resume_writer()

    def _look(self) -> None:
        self._timer = None
        if self.complete or self._closed is not None:
            return
        now = self._loop.time()
        if self._paused:
            self._heard_at = now
        remaining = self._heard_at + (self._idle if self._head else self._patience) - now
        if remaining <= 0:
            self._fail(ResponseTimeout())
            self.abort()
        else:
            self._timer = self._loop.call_later(min(remaining, self._idle), self._look)
