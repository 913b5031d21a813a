"""Calls back for what still lasts after a moment. What is over by then, as most requests are, costs almost nothing.

One timer serves all that began within a moment; it runs only while something is waited for. Rejected: a timer for each
(a handle, a context and the event loop's heap, twice a request).
"""

import asyncio
from collections.abc import Callable


class Call:
    """A call to come."""

    __slots__ = ("_back",)

    def __init__(self, back: Callable[[], None]) -> None:
        self._back: Callable[[], None] | None = back

    def cancel(self) -> None:
        """Have it not come."""
        self._back = None

    def come(self) -> None:
        """Call, unless it was cancelled."""
        back, self._back = self._back, None
        if back is not None:
            back()


class DelayedCalls:
    """Calls come between one and two moments after they were asked for, in that order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, moment: float) -> None:
        self._loop = loop
        self._moment = moment
        self._older: list[Call] = []
        self._newer: list[Call] = []
        self._timer: asyncio.TimerHandle | None = None

    def call(self, back: Callable[[], None]) -> Call:
        """Ask for a call; cancel it when what it watches is over."""
        call = Call(back)
        self._newer.append(call)
        if self._timer is None:
            self._timer = self._loop.call_later(self._moment, self._tick)
        return call

    def close(self) -> None:
        """Call nobody any more."""
        self._older, self._newer = [], []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        due, self._older, self._newer = self._older, self._newer, []
        self._timer = self._loop.call_later(self._moment, self._tick) if self._older else None
        for call in due:
            call.come()
