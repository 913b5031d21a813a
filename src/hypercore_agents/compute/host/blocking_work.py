"""Blocking work of a backend: in a few threads of its own, finished even when nobody waits for it any more.

A thread cannot be interrupted. So a cancelled caller waits for the end of what it began before it is cancelled: what a
step did is then known, and can be undone. What the host refuses (descriptors, memory, disk) comes out as the contract's
SandboxError.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from hypercore_agents.compute.base import SandboxError

T = TypeVar("T")


class Workers:
    """The threads of one backend, which works in `folder`."""

    def __init__(self, threads: int, name: str, folder: Path) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._folder = folder

    def begin(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Begin work in a thread; errors of the system come out as SandboxError."""

        def translated() -> T:
            with self.translated():
                return work(*arguments)

        return asyncio.get_running_loop().run_in_executor(self._threads, translated)

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Wait for work in a thread, to its end even when cancelled."""
        future = self.begin(work, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await settled(future)
            raise

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn errors of the system into SandboxError."""
        try:
            yield
        except OSError as error:
            raise SandboxError(f"cannot work in {self._folder}: {error}") from error

    async def close(self) -> None:
        """End the threads."""
        await asyncio.to_thread(self._threads.shutdown)


async def settled(future: asyncio.Future[T]) -> None:
    """Wait until the future is done, also when cancelled meanwhile."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
