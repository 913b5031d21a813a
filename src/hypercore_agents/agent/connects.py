"""Who may start a Claude CLI now: a start costs a quarter of a second of a core, so only a few run at a time.

Invariants: at most `limit` sessions start at a time, in the order in which they came; a spare begins to start only
while no session starts or waits to, and takes no session's place. A spare that has begun is not stopped again: most of
its cost is spent by then.

Rejected: spares under a lower scheduling priority until they are taken (the server may not raise it again, so that
every spare taken would cost the launcher a request).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class Connects:
    """The places for starts. `on_calm` is called whenever no session starts any more."""

    def __init__(self, limit: int) -> None:
        self.on_calm: Callable[[], None] = lambda: None
        self._places = asyncio.Semaphore(limit)
        self._sessions = 0

    @property
    def calm(self) -> bool:
        """Whether no session starts or waits to."""
        return self._sessions == 0

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Hold a place for a session's start, waiting for one if need be."""
        self._sessions += 1
        try:
            async with self._places:
                yield
        finally:
            self._sessions -= 1
            if self.calm:
                self.on_calm()
