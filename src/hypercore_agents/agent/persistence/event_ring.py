"""The last events of a session, for clients that lost their stream: a bounded ring, and those who follow it.

Ids are `generation.sequence` and only rise. The ring knows the id that came right before its first event (`start`): the
last one of the session's log when the session came here, or the last that it let go. Who saw that one or a later one
misses nothing. Who asks for what the ring has no more, or saw what was lost with another agent, gets a `reset` first
and then all that is there; a manager asks `holds` before, and reads the session's log where the answer is no.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from hypercore_agents.api.events import EventId, Reset, encode, parse_id

__all__ = ["EVENTS", "SIZE", "EventId", "EventLog", "parse_id"]
EVENTS, SIZE = 5000, 2 * 1024 * 1024
"""How many events a ring holds at most, and how many bytes of them."""


class EventLog:
    """One session's ring on this agent."""

    def __init__(self) -> None:
        self.start: EventId | None = None
        self.ahead: EventId | None = None
        """An event that readers of the log may have seen before it is here."""
        self._events: deque[tuple[EventId, bytes]] = deque()
        self._size = 0
        self._followers: set[asyncio.Event] = set()
        self._closed = False

    def add(self, event_id: EventId, frame: bytes) -> None:
        """Append one event, and let go of the oldest where there are too many."""
        self._events.append((event_id, frame))
        self._size += len(frame)
        while len(self._events) > EVENTS or (self._size > SIZE and len(self._events) > 1):
            self.start, oldest = self._events.popleft()
            self._size -= len(oldest)
        self._wake()

    def close(self) -> None:
        """Let those who follow go: the session is gone from here."""
        self._closed = True
        self._wake()

    def holds(self, last: EventId | None) -> bool:
        """Say whether all that comes after an id is here; None: whether the ring goes back to the first event."""
        last = last or (0, 0)
        if last in (self.start, self.ahead):
            return True
        return bool(self._events) and self._events[0][0] <= last <= self._events[-1][0]

    def after(self, last: EventId | None) -> tuple[bytes, EventId | None]:
        """Return the frames after an id (None: all that are there), and the id that is the last then.

        An id between `start` and the first event here, or of before and beyond all that was here, is somebody's who
        saw what is gone.
        """
        if not self._events or (last is not None and last == self.ahead):
            return b"", last
        newest = self._events[-1][0]
        if last is not None and not self.holds(last):
            reset = encode(Reset(reason="what came in between is not kept in the stream"))
            return reset + b"".join(frame for _, frame in self._events), newest
        # from the end: who follows wants the newest few
        found: list[bytes] = []
        for event_id, frame in reversed(self._events):
            if last is not None and event_id <= last:
                break
            found.append(frame)
        return b"".join(reversed(found)), newest

    async def follow(self, last: EventId | None, *, silence: float) -> AsyncGenerator[bytes, None]:
        """Yield frames after an id as they come, and nothing after each silence, until the session is gone."""
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
                    async with asyncio.timeout(silence):
                        await wake.wait()
                except TimeoutError:
                    yield b""
        finally:
            self._followers.discard(wake)

    def _wake(self) -> None:
        for follower in self._followers:
            follower.set()
