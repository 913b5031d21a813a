"""The event ring: the latest events of a session, in memory, for clients that reconnect to a stream.

Event ids are `generation.sequence` and only increase. `start` is the id right before the ring's first event: the last
event of the session's log when the session was placed here, or the last event that the ring dropped. A client that saw
`start` or a later event misses nothing. A client that asks for events that the ring no longer has, or saw events that
were lost with another agent, gets a `reset` first and then everything in the ring. A manager calls `holds` first and
reads the session's log instead if the answer is no.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from hypercore_agents.api.events import EventId, Reset, encode

EVENTS, SIZE = 5000, 2 * 1024 * 1024
"""How many events a ring holds at most, and how many bytes of them."""


class EventRing:
    """One session's ring on this agent."""

    def __init__(self) -> None:
        self.start: EventId | None = None
        self.announced: EventId | None = None
        """The id of an event that readers of the log may have seen before it is added here."""
        self._events: deque[tuple[EventId, bytes]] = deque()
        self._size = 0
        self._followers: set[asyncio.Event] = set()
        self._closed = False

    def add(self, event_id: EventId, frame: bytes) -> None:
        """Append one event, and drop the oldest ones beyond the limits."""
        self._events.append((event_id, frame))
        self._size += len(frame)
        while len(self._events) > EVENTS or (self._size > SIZE and len(self._events) > 1):
            self.start, oldest = self._events.popleft()
            self._size -= len(oldest)
        self._wake()

    def close(self) -> None:
        """End every `follow`: the session has left this agent."""
        self._closed = True
        self._wake()

    def holds(self, last: EventId | None) -> bool:
        """Return whether every event after an id is here; None: whether the ring starts with the session's first."""
        last = last or (0, 0)
        if last in (self.start, self.announced):
            return True
        return bool(self._events) and self._events[0][0] <= last <= self._events[-1][0]

    def after(self, last: EventId | None) -> tuple[bytes, EventId | None]:
        """Return the frames after an id (None: all of them), and the new last id.

        A `reset` comes first unless the ring holds the id: the client saw events that are no longer here.
        """
        if not self._events or (last is not None and last == self.announced):
            return b"", last
        newest = self._events[-1][0]
        if last is not None and not self.holds(last):
            reset = encode(Reset(reason="the events in between are no longer in the stream"))
            return reset + b"".join(frame for _, frame in self._events), newest
        # from the end, since a follower wants the newest few
        newer: list[bytes] = []
        for event_id, frame in reversed(self._events):
            if last is not None and event_id <= last:
                break
            newer.append(frame)
        return b"".join(reversed(newer)), newest

    async def follow(self, last: EventId | None, *, keepalive_seconds: float) -> AsyncGenerator[bytes, None]:
        """Yield frames after an id as they come, and b"" after each `keepalive_seconds` without any, until `close`."""
        wake = asyncio.Event()
        self._followers.add(wake)
        try:
            while True:
                wake.clear()
                frames, last = self.after(last)
                if frames:
                    yield frames
                if self._closed:
                    return
                try:
                    async with asyncio.timeout(keepalive_seconds):
                        await wake.wait()
                except TimeoutError:
                    yield b""
        finally:
            self._followers.discard(wake)

    def _wake(self) -> None:
        for follower in self._followers:
            follower.set()
