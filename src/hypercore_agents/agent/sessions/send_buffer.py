"""The buffer between a turn, which adds server-sent events, and the response, which sends them to the client.

A turn never waits for a client's socket, so its deadline holds whatever the client does. A slow client pauses its turn
only through `wait_for_space`; `release` ends such pauses permanently. The response takes the whole buffer in one call,
so that a burst of deltas is one write.
"""

import asyncio

from hypercore_agents.api.events import EventData, encode

LIMIT = 1024 * 1024
"""Bytes that the buffer holds before its turn pauses."""


class SendBuffer:
    """A bounded buffer between one turn and one response."""

    def __init__(self) -> None:
        self.added = asyncio.Event()
        self._frames: list[bytes] = []
        self._size = 0
        self._emptied = asyncio.Event()
        self._released = False

    @property
    def full(self) -> bool:
        """Whether the turn should pause until the client has read."""
        return self._size >= LIMIT and not self._released

    def add(self, event: EventData, event_id: str) -> None:
        """Append one event."""
        self.put(encode(event, event_id))

    def put(self, frame: bytes) -> None:
        """Append one encoded event."""
        self._frames.append(frame)
        self._size += len(frame)
        self._emptied.clear()
        self.added.set()

    def take(self) -> bytes:
        """Remove and return everything in the buffer."""
        taken = b"".join(self._frames)
        self._frames.clear()
        self._size = 0
        self._emptied.set()
        return taken

    async def wait_for_space(self) -> None:
        """Wait until the response has emptied the buffer, or until `release`."""
        while self.full:
            await self._emptied.wait()

    def release(self) -> None:
        """Stop pausing the turn: it is being stopped and adds little more."""
        self._released = True
        self._emptied.set()
