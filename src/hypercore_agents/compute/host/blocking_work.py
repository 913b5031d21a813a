"""Runs the blocking work of a backend in its own threads, to completion even if the caller is cancelled.

A thread cannot be interrupted. A cancelled caller therefore waits until its work is done, and is cancelled then: the
effect of each step is known and can be undone. Errors of the host (no descriptors, memory or disk space left) become
the contract's SandboxError.
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
    """The threads of one backend. `folder`, where the backend works, is named in errors."""

    def __init__(self, threads: int, name: str, folder: Path) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._folder = folder

    def submit(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Start work in a thread; an OSError becomes a SandboxError."""

        def run() -> T:
            with self.translated_errors():
                return work(*arguments)

        return asyncio.get_running_loop().run_in_executor(self._threads, run)

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Run work in a thread and wait for its end, even if cancelled."""
        return await finish(self.submit(work, *arguments))

    @contextlib.contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Turn an OSError into a SandboxError."""
        try:
            yield
        except OSError as error:
            raise SandboxError(f"cannot work in {self._folder}: {error}") from error

    async def close(self) -> None:
        """End the threads."""
        await asyncio.to_thread(self._threads.shutdown)


async def finish(future: asyncio.Future[T]) -> T:
    """Return the future's result; a cancelled caller first waits until the future is done."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await wait_until_done(future)
        raise


async def wait_until_done(future: asyncio.Future[T]) -> None:
    """Wait until the future is done, even if cancelled."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
