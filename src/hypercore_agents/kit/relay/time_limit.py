"""A limit in time that can be set while it is in force, and costs nothing until it is.

Rejected: asyncio.Timeout. Entering it asks for the current task in a way that costs a system call (it must find the
event loop first), which shows in every short relayed request.
"""

import asyncio
from types import TracebackType


class TimeLimit:
    """`with TimeLimit(loop) as limit`: raises TimeoutError in the entering task when a set limit has passed."""

    __slots__ = (
        "_cancelling",
        "_loop",
        "_over",
        "_passed",
        "_task",
        "_timer",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._passed = False
        self._over = False
        self._cancelling = 0

    def __enter__(self) -> "TimeLimit":
        task = asyncio.current_task(self._loop)
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        if not self._passed:
            return
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def set(self, seconds: float) -> None:
        """Let the limit be so many seconds from now; the earlier of two limits holds."""
        if self._over or self._passed:
            return
        if seconds <= 0:
            self._pass()
        elif self._timer is None or self._loop.time() + seconds < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(seconds, self._pass)

    def _pass(self) -> None:
        if not self._over and not self._passed:
            self._passed = True
            self._task.cancel()
