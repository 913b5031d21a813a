"""Who waits for an agent or a session to change, and how they hear of it.

In one process a change is heard at once. A change that another process made is not heard: whoever waits looks at
the store again after a while. So nothing is lost, and nothing needs a message bus.
"""

import asyncio

LOOK_SECONDS = 0.25


class ChangeSignals:
    """Wakes those who wait for a thing, by its id, in this process."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def notify(self, key: str) -> None:
        """Say that the thing has changed."""
        for future in self._waiting.pop(key, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, key: str, seconds: float = LOOK_SECONDS) -> None:
        """Return when the thing changes here, at the latest after `seconds`."""
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
