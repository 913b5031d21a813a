"""Who waits for an agent to change, and how they hear of it.

In one process a change is heard at once. A change that another process made is not heard: whoever waits looks at
the store again after `LOOK_SECONDS`. So nothing is lost, and nothing needs a message bus.
"""

import asyncio
from collections import defaultdict

LOOK_SECONDS = 0.25


class AgentChanges:
    """Wakes those who wait for an agent, in this process."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)

    def notify(self, agent_id: str) -> None:
        """Say that the agent's row has changed."""
        for future in self._waiting.pop(agent_id, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, agent_id: str, seconds: float = LOOK_SECONDS) -> None:
        """Return when the agent changes here, at the latest after `seconds`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[agent_id].add(future)
        try:
            await asyncio.wait((future,), timeout=seconds)
        finally:
            waiting = self._waiting.get(agent_id)
            if waiting is not None:
                waiting.discard(future)
                if not waiting:
                    del self._waiting[agent_id]
