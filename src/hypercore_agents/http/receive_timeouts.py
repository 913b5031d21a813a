"""How long a server waits for the rest of a request: a head that trickles in, a body that stops, a silent client.

One look over all connections, every `Patience.seconds`; what has not moved on between two looks is answered with 408 in
our shape and closed. So the limit holds between once and twice as long as it says, and no request pays for it: there is
no timer and no note of the time on its way. A head must end within it, however its bytes come; of a body any byte
counts. Not ended here, since the client is not to blame: a server that is still at work or that does not read on
(back-pressure), a client that was not yet told to `100 Continue`, and an idle connection, which has a keep-alive timer.

Rejected: a timer per request (twice the price of its head's parsing); reading the time at every read.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hypercore_agents.api.errors import HypercoreError, RequestTimeout
from hypercore_agents.api.ids import new_request_id

SECONDS = 30.0


class ReceiveTimeouts:
    """One server's looks at its connections. Another limit: put it into the server's configuration (`vars(config)`)."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, connections: set[Any], loop: asyncio.AbstractEventLoop) -> None:
        """Look at these connections from now on, for as long as there are any. Safe to repeat."""
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._look, connections, loop)

    def _look(self, connections: set[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for connection in list(connections):
            if isinstance(connection, TimeoutProtocol):
                connection.check_progress(self.seconds)
        if connections:
            self.watch(connections, loop)


class TimeoutProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, ending requests that do not go on."""

    _awaited_before: tuple[object, int] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        patience: ReceiveTimeouts = vars(self.config).setdefault("receive_timeouts", ReceiveTimeouts())
        patience.watch(self.connections, self.loop)

    def check_progress(self, seconds: float) -> None:
        """End the connection if it waits for what it waited for at the last look."""
        before, self._awaited_before = self._awaited_before, self.awaited()
        now = self._awaited_before
        if before is None or now is None or before[0] is not now[0] or before[1] != now[1]:
            return
        cycle = self.cycle
        if self.scope is None or self._is_over():
            self.transport.close()  # not a byte of a request
        elif cycle is not None and cycle.scope is self.scope and cycle.response_started:
            self.transport.abort()  # an answer has begun already
        else:
            self.refuse(RequestTimeout(f"the request did not arrive: nothing of it came on within {seconds:g} s"))

    def awaited(self) -> tuple[object, int] | None:
        """Return what the client owes, the same thing for as long as it does not go on; None: it owes nothing."""
        cycle, scope = self.cycle, self.scope
        if self.transport.is_closing():
            return None
        if scope is None or self._is_over():
            return None if self.is_idle() else (scope or self, 0)
        if cycle is None or cycle.scope is not scope:  # in a head
            return (scope, 0) if cycle is None or cycle.response_complete else None
        if cycle.response_complete:  # the rest of a body that nobody wants
            return scope, 0
        if not cycle.more_body or self.flow.read_paused or cycle.waiting_for_100_continue:
            return None
        return cycle.body, len(cycle.body)

    def is_idle(self) -> bool:
        """Whether the keep-alive timer watches over the connection."""
        return self.timeout_keep_alive_task is not None

    def refuse(self, error: HypercoreError) -> None:
        """Answer with an error outside of any app, and close."""
        body = error.body(new_request_id()).model_dump_json(exclude_none=True).encode()
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _is_over(self) -> bool:
        """Whether the last request has come, is answered, and no other one has begun."""
        cycle = self.cycle
        return cycle is not None and cycle.scope is self.scope and cycle.response_complete and not cycle.more_body
