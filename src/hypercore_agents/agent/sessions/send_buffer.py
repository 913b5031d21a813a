"""What a streaming client has yet to get: the turn adds frames, the response takes them.

The turn never waits for a client's socket, so its deadline holds whatever the client does; a slow client holds the turn
up only through `room`, which `release` opens for good. The response takes all that is there in one go, so that a burst
of deltas is one write.
"""

import asyncio

from hypercore_agents.api.events import EventData, encode

LIMIT = 1024 * 1024
"""Bytes that may wait for a client before its turn pauses."""


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
        """Append one event as it is sent."""
        self._frames.append(frame)
        self._size += len(frame)
        self._emptied.clear()
        self.added.set()

    def take(self) -> bytes:
        """Return all that waits, and forget it."""
        taken = b"".join(self._frames)
        self._frames.clear()
        self._size = 0
        self._emptied.set()
        return taken

    async def room(self) -> None:
        """Wait until the client has taken what was there, or until `release`."""
        while self.full:
            await self._emptied.wait()

    def release(self) -> None:
        """Hold the turn up no more: it is being stopped, and has little left to say."""
        self._released = True
        self._emptied.set()
