"""Wakes tasks that wait for an agent or a session to change.

A change by this process wakes them at once. A change by another process does not: waiting tasks also read the store
again after a timeout. So no change is missed, and no message bus is needed.
"""

import asyncio

WAIT_SECONDS = 0.25


class ChangeSignals:
    """Waits and wake-ups in this process, by the id of the agent or session."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def notify(self, key: str) -> None:
        """Wake the tasks that wait for this id."""
        for future in self._waiting.pop(key, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, key: str, seconds: float = WAIT_SECONDS) -> None:
        """Return when `notify` is called for this id, at the latest after `seconds`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, set()).add(future)
        try:
            await asyncio.wait((future,), timeout=seconds)
        finally:
            waiting = self._waiting.get(key)
            if waiting is not None:
                waiting.discard(future)
                if not waiting:
                    del self._waiting[key]
