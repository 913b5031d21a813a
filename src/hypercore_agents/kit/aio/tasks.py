"""Named and supervised background tasks.

Invariants: every task has an owner that is closed exactly once. A task that fails is logged with its name at once
(never "Task exception was never retrieved"). A periodic task continues after a failed iteration.

Rejected: `asyncio.TaskGroup` alone, because one failing child cancels its siblings and the server with them.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

T = TypeVar("T")
_log = structlog.get_logger(__name__)


class Tasks:
    """The background tasks of one component. `close` cancels them and waits for their end."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def start(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` once in the background; a failure is logged under `owner.name`.

        Raises RuntimeError after `close`.
        """
        if self._closed:
            work.close()
            raise RuntimeError(f"{self._owner} is closed; task {name} was not started")
        task = asyncio.create_task(work, name=f"{self._owner}.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def repeat(self, name: str, iteration: Callable[[], Awaitable[object]], *, every: float) -> asyncio.Task[None]:
        """Call `iteration` repeatedly, with pauses of `every` seconds, even if it raises."""

        async def loop() -> None:
            while True:
                try:
                    await iteration()
                except Exception:
                    _log.exception("task.iteration_failed", task=f"{self._owner}.{name}")
                await asyncio.sleep(every)

        return self.start(name, loop())

    async def finish(self, *, within: float) -> None:
        """Wait at most `within` seconds for running tasks, then cancel the rest. No task can be started afterwards."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within)
        await self.close()

    async def close(self) -> None:
        """Cancel running tasks and wait for their end. Safe to call twice."""
        self._closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task.failed", task=task.get_name(), exc_info=error)
