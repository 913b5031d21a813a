"""A lane for work that would hold up the event loop: one piece of work at a time, in a thread, with pauses.

Python code in a thread lets the loop go on every few milliseconds, but C code (a JSON parser) does not, so a thread
alone is not enough: a lane that is always busy would take most of the time from all other work. After each piece of
work the lane therefore rests for as long as the work took (at most `_LONGEST_REST` seconds), which leaves the loop at
least half of the processor. Each holder has one piece of work in the line at a time, so that many of one cannot delay
those of others.

Rejected: a pool of processes (the parsed value would have to be pickled back, which costs as much as parsing it).
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")
_LONGEST_REST = 0.25


class ThreadLane:
    """Runs work one piece at a time, in the order in which holders came. Close it at the end."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._free = asyncio.Semaphore(1)
        self._lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, holder: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise what it raises."""
        line = self._lines.get(holder)
        if line is None:
            line = self._lines[holder] = asyncio.Lock()
        async with line:
            await self._free.acquire()
            loop, started = asyncio.get_running_loop(), time.perf_counter()
            try:
                return await loop.run_in_executor(self._executor, work)
            finally:
                loop.call_later(min(_LONGEST_REST, time.perf_counter() - started), self._free.release)

    def close(self) -> None:
        """Take no more work; what runs ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
