"""A keyed work queue without duplicates, for a level-triggered reconciler.

Invariants: at most one worker handles a key at a time. A waiting key is not added twice; a key that is added while it
is handled runs once more afterwards. A failed key is retried after a growing, bounded pause, which a success resets.
Keys that wait longer start earlier; there is no other order.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from hypercore_agents.kit.aio.tasks import Tasks

_log = structlog.get_logger(__name__)

Handler = Callable[[str], Awaitable[float | None]]
"""Handles one key. Returns the seconds after which the key is to be handled again, or None."""


class WorkQueue:
    """Runs `handler(key)` in up to `workers` tasks. Pauses after failures grow from `first_pause` to `last_pause` s.

    `on_lag` is called with the seconds that a key waited before it was handled.
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
        """Schedule a key to be handled as soon as possible."""
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting[key] = time.monotonic()
            self._ready.put_nowait(key)

    def add_after(self, key: str, seconds: float) -> None:
        """Schedule a key to be handled after a pause, unless it is already scheduled."""
        if key in self._timers or key in self._waiting:
            return
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self._due, key)

    def depth(self) -> int:
        """Return the number of keys that are waiting or being handled, without those in a pause."""
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
