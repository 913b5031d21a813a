"""Calls that are made only for requests that are still running after a short delay; short requests pay almost nothing.

One timer serves all calls of one interval, and it runs only while calls are pending. Rejected: a timer for each request
(a handle, a context and two operations on the event loop's heap).
"""

import asyncio
from collections.abc import Callable


class DelayedCall:
    """A pending call."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Drop the call."""
        self._callback = None

    def run(self) -> None:
        """Make the call unless it was cancelled."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class DelayedCalls:
    """Makes each call between one and two `delay`s (seconds) after it was requested, in the order of the requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, delay: float) -> None:
        self._loop = loop
        self._delay = delay
        self._older: list[DelayedCall] = []
        self._newer: list[DelayedCall] = []
        self._timer: asyncio.TimerHandle | None = None

    def call(self, callback: Callable[[], None]) -> DelayedCall:
        """Request a call. Cancel it when the request that it watches has ended."""
        call = DelayedCall(callback)
        self._newer.append(call)
        if self._timer is None:
            self._timer = self._loop.call_later(self._delay, self._tick)
        return call

    def close(self) -> None:
        """Drop all pending calls."""
        self._older, self._newer = [], []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        due, self._older, self._newer = self._older, self._newer, []
        self._timer = self._loop.call_later(self._delay, self._tick) if self._older else None
        for call in due:
            call.run()
