"""A time limit that can be set while it is active and costs nothing until then.

Rejected: asyncio.Timeout. Entering it looks up the event loop by a system call, which is measurable in short relayed
requests.
"""

import asyncio
from types import TracebackType


class TimeLimit:
    """`with TimeLimit(loop) as limit` raises TimeoutError in the task that entered it once a set limit has expired."""

    __slots__ = (
        "_cancelling",
        "_expired",
        "_left",
        "_loop",
        "_task",
        "_timer",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._left = False
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
        self._left = True
        if self._timer is not None:
            self._timer.cancel()
        if not self._expired:
            return
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def set(self, seconds: float) -> None:
        """Set the limit to this many seconds from now. If it is set several times, the earliest limit applies."""
        if self._left or self._expired:
            return
        if seconds <= 0:
            self._expire()
        elif self._timer is None or self._loop.time() + seconds < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if not self._left and not self._expired:
            self._expired = True
            self._task.cancel()
