"""Timeouts for receiving requests: for slowly arriving heads, stalled bodies, and clients that send nothing.

One check covers all connections, every `ReceiveTimeouts.seconds`. A request that has not progressed between two checks
is refused with 408 in the common error shape, and its connection is closed. So the limit is between one and two times
`seconds`, and requests pay nothing: no timer, no reading of the clock. A head must be complete within the limit; for a
body, any byte counts as progress. Connections that do not wait for their client are left alone: the app is still at
work or does not read (back-pressure), `100 Continue` has not been sent, or the connection is idle and has a keep-alive
timer.

Rejected: a timer per request (twice the cost of parsing its head); reading the clock at every read.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hypercore_agents.api.errors import HypercoreError, RequestTimeout
from hypercore_agents.api.ids import new_request_id

SECONDS = 30.0


class ReceiveTimeouts:
    """The periodic check of one server. To change its limit, set `vars(config)["receive_timeouts"]`."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, connections: set[Any], loop: asyncio.AbstractEventLoop) -> None:
        """Check these connections periodically while there are any. Safe to repeat."""
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._check, connections, loop)

    def _check(self, connections: set[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for connection in list(connections):
            if isinstance(connection, TimeoutProtocol):
                connection.check_progress(self.seconds)
        if connections:
            self.watch(connections, loop)


class TimeoutProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with timeouts for requests that do not arrive."""

    _last_progress: tuple[object, int] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        timeouts: ReceiveTimeouts = vars(self.config).setdefault("receive_timeouts", ReceiveTimeouts())
        timeouts.watch(self.connections, self.loop)

    def check_progress(self, seconds: float) -> None:
        """End the connection if its request has not progressed since the last check."""
        before, self._last_progress = self._last_progress, self.progress()
        now = self._last_progress
        if before is None or now is None or before[0] is not now[0] or before[1] != now[1]:
            return
        cycle = self.cycle
        if self.scope is None or self._is_over():
            self.transport.close()  # no byte of a request
        elif cycle is not None and cycle.scope is self.scope and cycle.response_started:
            self.transport.abort()  # a response has begun already
        else:
            self.refuse(RequestTimeout(f"the request is incomplete: no more of it arrived within {seconds:g} s"))

    def progress(self) -> tuple[object, int] | None:
        """Return the received part of an incomplete request, None if no part is missing.

        Equal values mean that nothing was received in between.
        """
        cycle, scope = self.cycle, self.scope
        if self.transport.is_closing():
            return None
        if scope is None or self._is_over():
            return None if self.is_idle() else (scope or self, 0)
        if cycle is None or cycle.scope is not scope:  # within a head
            return (scope, 0) if cycle is None or cycle.response_complete else None
        if cycle.response_complete:  # the rest of a body whose response was sent
            return scope, 0
        if not cycle.more_body or self.flow.read_paused or cycle.waiting_for_100_continue:
            return None
        return cycle.body, len(cycle.body)

    def is_idle(self) -> bool:
        """Whether the connection is idle, so that its keep-alive timer runs."""
        return self.timeout_keep_alive_task is not None

    def refuse(self, error: HypercoreError) -> None:
        """Send an error without calling the app, and close the connection."""
        body = error.body(new_request_id()).model_dump_json(exclude_none=True).encode()
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _is_over(self) -> bool:
        """Whether the last request has been received and answered, and no other has begun."""
        cycle = self.cycle
        return cycle is not None and cycle.scope is self.scope and cycle.response_complete and not cycle.more_body
