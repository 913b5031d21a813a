"""Runs blocking work in one thread, one piece at a time and with pauses, so that the event loop keeps running.

Python code in a thread releases the interpreter every few milliseconds, but C code such as a JSON parser does not, so a
thread alone is not enough. After each piece, the lane therefore rests for as long as the piece took (at most
`_MAX_REST` seconds), which leaves the event loop at least half of the processor. Each holder has at most one piece
waiting at a time, so many pieces of one holder do not delay other holders.

Rejected: a process pool (pickling the parsed value costs as much as parsing it).
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")
_MAX_REST = 0.25


class ThreadLane:
    """Runs one piece of work at a time, in the order of the holders' arrival. Close it at the end."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._free = asyncio.Semaphore(1)
        self._holders: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, holder: str, work: Callable[[], T]) -> T:
        """Call `work` in the thread; return its result or raise its exception."""
        lock = self._holders.get(holder)
        if lock is None:
            lock = self._holders[holder] = asyncio.Lock()
        async with lock:
            await self._free.acquire()
            loop, started = asyncio.get_running_loop(), time.perf_counter()
            try:
                return await loop.run_in_executor(self._executor, work)
            finally:
                loop.call_later(min(_MAX_REST, time.perf_counter() - started), self._free.release)

    def close(self) -> None:
        """Accept no more work. Running work ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
