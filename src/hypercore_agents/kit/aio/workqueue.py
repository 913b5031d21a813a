"""A keyed, deduplicating work queue, as a level-triggered reconciler needs it.

Invariants: a key is worked on by at most one worker at a time; a key added while it waits is not added twice; a
key added while it is worked on runs once more afterwards; a failure comes back after a growing, bounded pause;
`forget` resets that pause. Nothing is ordered but that a key that waits longer starts earlier.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from hypercore_agents.kit.aio.tasks import Tasks

_log = structlog.get_logger(__name__)

Handler = Callable[[str], Awaitable[float | None]]
"""Works on one key. Returns seconds after which the key wants to be looked at again, or None."""


class WorkQueue:
    """Runs `handler(key)` in up to `workers` tasks. Pauses after failures: `first_pause` doubling to `last_pause` s.

    `on_lag` is told the seconds that a key was due before it was worked on.
    """

    def __init__(
        self,
        name: str,
        handler: Handler,
        *,
        workers: int = 8,
        first_pause: float = 0.2,
        last_pause: float = 30.0,
        on_lag: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._handler = handler
        self._workers = workers
        self._first_pause = first_pause
        self._last_pause = last_pause
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._waiting: dict[str, float] = {}
        self._on_lag = on_lag
        self._working: set[str] = set()
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks = Tasks(name)

    def start(self) -> None:
        """Start the workers."""
        for number in range(self._workers):
            self._tasks.start(f"worker-{number}", self._work())

    def add(self, key: str) -> None:
        """Ask for the key to be worked on as soon as possible."""
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting[key] = time.monotonic()
            self._ready.put_nowait(key)

    def add_after(self, key: str, seconds: float) -> None:
        """Ask for the key to be worked on after a pause, unless it is asked for earlier."""
        if key in self._timers or key in self._waiting:
            return
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self._due, key)

    def depth(self) -> int:
        """Return how many keys wait or are worked on now (those that pause do not count)."""
        return len(self._waiting) + len(self._working)

    async def close(self) -> None:
        """Cancel the workers and all pauses."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        await self._tasks.close()

    def _due(self, key: str) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def _work(self) -> None:
        while True:
            key = await self._ready.get()
            self._on_lag(time.monotonic() - self._waiting.pop(key))
            self._working.add(key)
            pause: float | None
            try:
                pause = await self._handler(key)
                self._failures.pop(key, None)
            except Exception:
                failures = self._failures.get(key, 0)
                self._failures[key] = failures + 1
                pause = min(self._first_pause * 2 ** min(failures, 30), self._last_pause)
                _log.exception("workqueue.failed", key=key, failures=failures + 1, pause_seconds=pause)
            finally:
                self._working.discard(key)
            if key in self._again:
                self._again.discard(key)
                self.add(key)
            elif pause is not None:
                self.add_after(key, pause)
