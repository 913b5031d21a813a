"""The client of a relayed request: reads its request body and detects its disconnect."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Literal

from hypercore_agents.api.errors import InvalidRequest, PayloadTooLarge, readable_size
from hypercore_agents.kit.relay.connection_pool import SHORT_REQUEST_SECONDS
from hypercore_agents.kit.relay.observer import RelayOutcome
from hypercore_agents.kit.relay.raw_response import RawResponse
from hypercore_agents.kit.relay.time_limit import TimeLimit
from hypercore_agents.kit.relay.upstream import RequestLimits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
DisconnectMode = Literal["cancel", "drain", "drain_begun"]
OnDisconnect = DisconnectMode | Callable[[], DisconnectMode]
"""What happens to a request whose client disconnects; a callable is called at that moment."""


class RelayClient:
    """The client of one relayed request."""

    __slots__ = (
        "_body_read",
        "_drain_seconds",
        "_limits",
        "_on_disconnect",
        "_outcome",
        "_raw",
        "_receive",
        "_time_limit",
        "_watcher",
        "gone",
    )

    def __init__(
        self,
        receive: Receive,
        raw: RawResponse | None,
        time_limit: TimeLimit,
        outcome: RelayOutcome,
        on_disconnect: OnDisconnect,
        drain_seconds: float | None,
        limits: RequestLimits,
        *,
        body_read: bool,
    ) -> None:
        self.gone = False
        self._receive = receive
        self._raw = raw
        self._time_limit = time_limit
        self._outcome = outcome
        self._on_disconnect = on_disconnect
        self._drain_seconds = drain_seconds
        self._limits = limits
        self._watcher: asyncio.Task[None] | None = None
        self._body_read = None if body_read else asyncio.Event()

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the request's body as it arrives. Raises PayloadTooLarge over the limit."""
        received = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.disconnected()
                raise InvalidRequest("the client disconnected before it had sent the whole request")
            piece = message.get("body", b"")
            received += len(piece)
            if received > self._limits.request_bytes:
                raise self.too_large()
            if piece:
                yield piece
            if not message.get("more_body", False):
                if self._body_read is not None:
                    self._body_read.set()
                return

    def enforce_limits(self) -> None:
        """Start the total time limit and the watch for a disconnect, `SHORT_REQUEST_SECONDS` after the start."""
        if self._limits.total is not None:
            self._time_limit.set(self._limits.total - SHORT_REQUEST_SECONDS)
        self.watch()

    def watch(self) -> None:
        """Detect from now on that the client disconnects, once its request has been read. Safe to repeat."""
        if self._raw is not None and self._raw.request_read:
            self._raw.on_disconnect(self.disconnected)
        elif self._watcher is None:
            self._watcher = asyncio.create_task(self._wait_for_disconnect(), name="relay.watch")

    def unwatch(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._raw is not None:
            self._raw.on_disconnect(None)

    async def _wait_for_disconnect(self) -> None:
        if self._body_read is not None:
            await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.disconnected()

    def too_large(self) -> PayloadTooLarge:
        """Return the error for a request body over the limit."""
        limit = self._limits.request_bytes
        return PayloadTooLarge(f"the body is larger than {readable_size(limit)}", details={"limit_bytes": limit})

    def disconnected(self) -> None:
        """Record that the client has disconnected, and cancel the request or bound its draining."""
        self.gone = True
        mode = self._on_disconnect if isinstance(self._on_disconnect, str) else self._on_disconnect()
        if mode == "cancel" or (mode == "drain_begun" and not self._outcome.sent_bytes):
            self._time_limit.set(0)
        elif self._drain_seconds is not None:
            self._time_limit.set(self._drain_seconds)
