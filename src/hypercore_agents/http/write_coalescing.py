"""uvicorn's HTTP protocol with write coalescing (one system call instead of two) and direct writes for relayed streams.

Bytes that are written during one iteration of the event loop are sent together at its end, so no event of a stream is
delayed. Direct writes (`kit/relay/raw_response.py`) produce the same bytes as ASGI messages, in the same order.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from hypercore_agents.http.strict import StrictProtocol
from hypercore_agents.kit.relay.raw_response import EXTENSION

LINGER_SECONDS = 10.0
"""How long the rest of a request's body is read and dropped after a response that ends the connection."""


class CoalescingProtocol(StrictProtocol):
    """Pass it to uvicorn as `http`."""

    transport: "_CoalescingTransport"  # type: ignore[assignment]
    _raw_response: "_DirectResponse | None" = None
    """That of the current request; requests of one connection are served one after another."""
    _idle_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        pending: _PendingWrites = vars(self.config).setdefault("pending_writes", _PendingWrites())
        coalescing = _CoalescingTransport(transport, pending, self.loop, self._request_incomplete)
        super().connection_made(coalescing)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. The rest of a body whose response was sent is dropped."""
        if not self.transport.lingering:
            super().data_received(data)

    def _request_incomplete(self) -> bool:
        """Return whether the rest of a request is still arriving: its head, or its body after the response."""
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope:
            return self._in_head and bool(self._received_of_head)
        return cycle.response_complete and bool(cycle.more_body)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        raw, self._raw_response = self._raw_response, None
        if raw is not None:
            raw.client_disconnected()

    def on_response_complete(self) -> None:
        """Send the whole response now and serve the next request.

        Unlike in uvicorn, one keep-alive timer checks when the last response ended, instead of one timer per response.
        """
        self.transport.flush()
        raw, self._raw_response = self._raw_response, None
        if raw is not None:
            raw.end()
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if nothing has been received for the keep-alive time."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        remaining = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if remaining > 0:
            self.timeout_keep_alive_task = self.loop.call_later(remaining, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def is_idle(self) -> bool:
        """See TimeoutProtocol."""
        return self._idle_since is not None

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._raw_response = raw = _DirectResponse(self.flow, cycle)
        cycle.scope["extensions"] = {EXTENSION: raw}  # type: ignore[dict-item]
        super()._start_asgi_task(cycle, _closing_when_cancelled(app, cycle))


def _closing_when_cancelled(app: Any, cycle: RequestResponseCycle) -> Any:
    """Return the app, changed to close the connection when it is cancelled.

    That happens when the server stops and the grace period of its requests is over. uvicorn would log a stack trace for
    each request.
    """

    async def run(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            cycle.disconnected = True
            cycle.transport.close()

    return run


class _DirectResponse:
    """Implements RawResponse. It drops its reference to the request when the response ends.

    Otherwise scope and request form a reference cycle, which only the cycle collector finds.
    """

    __slots__ = ("_callback", "_cycle", "_disconnected", "_flow")

    def __init__(self, flow: FlowControl, cycle: RequestResponseCycle) -> None:
        self._flow = flow
        self._cycle: RequestResponseCycle | None = cycle
        self._disconnected = False
        self._callback: Callable[[], None] | None = None

    @property
    def request_read(self) -> bool:
        cycle = self._cycle
        return cycle is None or not (cycle.more_body or cycle.body)

    @property
    def writable(self) -> bool:
        cycle = self._cycle
        return (
            cycle is not None
            and not self._flow.write_paused
            and cycle.chunked_encoding is True
            and cycle.scope["method"] != "HEAD"
        )

    def write(self, data: bytes) -> None:
        if self._cycle is not None:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        if callback is not None and self._disconnected:
            callback()
            return
        if callback is not None:
            # Reading stays paused after a large last piece of a body. Without a call of `receive`, a paused connection
            # would not detect the disconnect.
            self._flow.resume_reading()
        self._callback = callback

    def abort(self) -> None:
        if self._cycle is not None:
            self._cycle.transport.abort()

    def end(self) -> None:
        self._cycle = self._callback = None

    def client_disconnected(self) -> None:
        self._disconnected = True
        callback = self._callback
        self.end()
        if callback is not None:
            callback()


class _PendingWrites:
    """The connections of a server with pending writes; one callback at the end of the iteration flushes all."""

    def __init__(self) -> None:
        self._transports: list[_CoalescingTransport] = []

    def add(self, transport: "_CoalescingTransport", loop: asyncio.AbstractEventLoop) -> None:
        if not self._transports:
            loop.call_soon(self._flush)
        self._transports.append(transport)

    def _flush(self) -> None:
        transports, self._transports = self._transports, []
        for transport in transports:
            transport.flush()


class _CoalescingTransport:
    """A transport that joins writes. All other calls go to the real transport, after pending writes."""

    def __init__(
        self,
        transport: asyncio.Transport,
        pending: _PendingWrites,
        loop: asyncio.AbstractEventLoop,
        request_incomplete: Callable[[], bool] = lambda: False,
    ) -> None:
        self.lingering = False
        self._transport = transport
        self._pending = pending
        self._loop = loop
        self._request_incomplete = request_incomplete
        self._waiting: list[bytes] = []
        self.get_extra_info = transport.get_extra_info
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.abort = transport.abort

    def write(self, data: bytes) -> None:
        if not data:
            return
        if not self._waiting:
            self._pending.add(self, self._loop)
        self._waiting.append(data)

    def is_closing(self) -> bool:
        return self.lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection. While a request is still arriving, close only the sending side, and the rest later.

        Otherwise the kernel resets the connection, and a client that is still sending never reads the response that
        says why.
        """
        self.flush()
        if self.lingering:
            return
        if self._request_incomplete() and self._transport.can_write_eof() and not self._transport.is_closing():
            self.lingering = True
            self._transport.write_eof()
            self._transport.resume_reading()
            self._loop.call_later(LINGER_SECONDS, self._transport.abort)
        else:
            self._transport.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.flush()
        self._transport.set_protocol(protocol)

    def flush(self) -> None:
        waiting = self._waiting
        if waiting:
            self._waiting = []
            if not self._transport.is_closing():
                self._transport.write(waiting[0] if len(waiting) == 1 else b"".join(waiting))
