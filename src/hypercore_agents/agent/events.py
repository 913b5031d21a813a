"""The last events of a session, for clients that lost their stream: a bounded ring, and those who follow it.

Ids are `generation.sequence` and only rise. Who asks for what the ring has no more, or for another generation's, gets a
`reset` first and then all that is there: what came before is in the conversation's history, not in the stream.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from hypercore_agents.api.events import Reset, encode

EVENTS, SIZE = 5000, 2 * 1024 * 1024
"""How many events a ring holds at most, and how many bytes of them."""

EventId = tuple[int, int]


def parse_id(text: str | None) -> EventId | None:
    """Return the id that a client saw last, None for none and for what is no id of ours."""
    generation, dot, sequence = (text or "").partition(".")
    if not dot or not all(part.isascii() and part.isdigit() and len(part) < 12 for part in (generation, sequence)):
        return None
    return int(generation), int(sequence)


class EventLog:
    """One session's ring on this agent."""

    def __init__(self) -> None:
        self._events: deque[tuple[EventId, bytes]] = deque()
        self._size = 0
        self._forgotten: EventId | None = None
        self._followers: set[asyncio.Event] = set()
        self._closed = False

    def add(self, event_id: str, frame: bytes) -> None:
        """Append one event, and let go of the oldest where there are too many."""
        known = parse_id(event_id)
        assert known is not None
        self._events.append((known, frame))
        self._size += len(frame)
        while len(self._events) > EVENTS or (self._size > SIZE and len(self._events) > 1):
            self._forgotten, oldest = self._events.popleft()
            self._size -= len(oldest)
        self._wake()

    def close(self) -> None:
        """Let those who follow go: the session is gone from here."""
        self._closed = True
        self._wake()

    def after(self, last: EventId | None) -> tuple[bytes, EventId | None]:
        """Return the frames after an id (None: all that are there), and the id that is the last then."""
        if not self._events:
            return b"", last
        newest = self._events[-1][0]
        oldest = self._forgotten or (self._events[0][0][0], 0)
        if last is not None and not oldest <= last <= newest:
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
