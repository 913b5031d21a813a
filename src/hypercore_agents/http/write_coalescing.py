"""uvicorn's HTTP protocol with one system call where it makes two, and with a short way for relayed streams.

What is written within one turn of the event loop leaves together, at that turn's end. Nothing waits longer: an event of
a stream leaves in the same turn in which it was written. The short way (`kit/relay/raw_response.py`) writes what ASGI's
messages would write, in the same order.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from hypercore_agents.http.strict import StrictProtocol
from hypercore_agents.kit.relay.raw_response import EXTENSION

LINGER_SECONDS = 10.0
"""How long what comes of a body is read and dropped after its answer, where the connection ends with it."""


class CoalescingProtocol(StrictProtocol):
    """Pass it to uvicorn as `http`."""

    transport: "_Corked"  # type: ignore[assignment]
    _direct: "_Direct | None" = None
    """Of the request that is served; those of one connection are served one after another."""
    _idle_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        corks: _Corks = vars(self.config).setdefault("corks", _Corks())
        corked = _Corked(transport, corks, self.loop, self._body_comes)
        super().connection_made(corked)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. What comes of a body whose answer was sent is dropped."""
        if not self.transport.lingering:
            super().data_received(data)

    def _body_comes(self) -> bool:
        """Return whether the rest of a request is still arriving: its head, or its body after the answer."""
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope:
            return self._in_head and bool(self._arrived)
        return cycle.response_complete and bool(cycle.more_body)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        direct, self._direct = self._direct, None
        if direct is not None:
            direct.lose()

    def on_response_complete(self) -> None:
        """Let the whole answer leave now, and serve the next request, as uvicorn does but for the timer: one that looks
        when the last answer ended, not one an answer."""
        self.transport.flush()
        direct, self._direct = self._direct, None
        if direct is not None:
            direct.end()
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
        """Close the connection if nothing has come since the last answer, for as long as is allowed."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        remaining = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if remaining > 0:
            self.timeout_keep_alive_task = self.loop.call_later(remaining, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def is_idle(self) -> bool:
        """See PatientProtocol."""
        return self._idle_since is not None

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._direct = direct = _Direct(self.flow, cycle)
        cycle.scope["extensions"] = {EXTENSION: direct}  # type: ignore[dict-item]
        super()._start_asgi_task(cycle, _closing_when_cancelled(app, cycle))


def _closing_when_cancelled(app: Any, cycle: RequestResponseCycle) -> Any:
    """Return the app with a close of the connection where it is cancelled: the server stops, and its requests' grace is
    over. uvicorn would log a stack trace for each."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            cycle.disconnected = True
            cycle.transport.close()

    return run


class _Direct:
    """See kit.relay.raw_response. Knows its request only until the answer is complete: scope and request are a ring
    else, which only the cycle collector would find."""

    __slots__ = ("_cycle", "_flow", "_gone", "_when_gone")

    def __init__(self, flow: FlowControl, cycle: RequestResponseCycle) -> None:
        self._flow = flow
        self._cycle: RequestResponseCycle | None = cycle
        self._gone = False
        self._when_gone: Callable[[], None] | None = None

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

    def on_disconnect(self, call: Callable[[], None] | None) -> None:
        if call is not None and self._gone:
            call()
            return
        if call is not None:
            # A large last piece of a body left reading paused: nobody calls `receive`, so the end would not be seen.
            self._flow.resume_reading()
        self._when_gone = call

    def abort(self) -> None:
        if self._cycle is not None:
            self._cycle.transport.abort()

    def end(self) -> None:
        self._cycle = self._when_gone = None

    def lose(self) -> None:
        self._gone = True
        call = self._when_gone
        self.end()
        if call is not None:
            call()


class _Corks:
    """What waits for this turn's end, of all connections of a server: one callback for them together."""

    def __init__(self) -> None:
        self._waiting: list[_Corked] = []

    def add(self, corked: "_Corked", loop: asyncio.AbstractEventLoop) -> None:
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append(corked)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for corked in waiting:
            corked.flush()


class _Corked:
    """A transport whose writes are joined. Everything else goes straight to the real one, after what waits."""

    def __init__(
        self,
        transport: asyncio.Transport,
        corks: _Corks,
        loop: asyncio.AbstractEventLoop,
        body_comes: Callable[[], bool] = lambda: False,
    ) -> None:
        self.lingering = False
        self._transport = transport
        self._corks = corks
        self._loop = loop
        self._body_comes = body_comes
        self._waiting: list[bytes] = []
        self.get_extra_info = transport.get_extra_info
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.abort = transport.abort

    def write(self, data: bytes) -> None:
        if not data:
            return
        if not self._waiting:
            self._corks.add(self, self._loop)
        self._waiting.append(data)

    def is_closing(self) -> bool:
        return self.lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close; while the rest of a body is still coming, only our side, and the other one a little later: the kernel
        would reset the connection, and a client that is still sending would lose the answer that says why."""
        self.flush()
        if self.lingering:
            return
        if self._body_comes() and self._transport.can_write_eof() and not self._transport.is_closing():
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
