"""Whether what the gateway needs answers: the store (asked each time), the Claude API (at most twice a minute)."""

import asyncio
import time
from typing import Any

from hypercore_agents.api.errors import HypercoreError, Unavailable
from hypercore_agents.kit.relay import Limits, Relay
from hypercore_agents.store.database import Database

_REMEMBERED_SECONDS = 30.0
_PATIENCE = Limits(connect=3, answer=5, idle=5)


class Health:
    """Looks at the gateway's dependencies."""

    def __init__(self, database: Database, relay: Relay, api_url: str) -> None:
        self._database = database
        self._relay = relay
        self._api_url = api_url
        self._asked_at = -_REMEMBERED_SECONDS
        self._api = "unknown"
        self._asking = asyncio.Lock()

    async def require_store(self) -> None:
        """Raise Unavailable when the store does not answer in time."""
        try:
            async with asyncio.timeout(3):
                await self._database.check()
        except TimeoutError:
            raise Unavailable("the store does not answer") from None

    async def report(self) -> tuple[dict[str, Any], bool]:
        """Return each dependency's state by name, and whether the gateway can serve at all."""
        try:
            await self.require_store()
            store = "ok"
        except HypercoreError:
            store = "unavailable"
        api = await self._claude_api()
        serving = store == "ok"
        status = "ok" if serving and api == "ok" else "degraded" if serving else "unavailable"
        return {"status": status, "dependencies": {"store": store, "claude_api": api}}, serving

    async def _claude_api(self) -> str:
        async with self._asking:
            if time.monotonic() - self._asked_at >= _REMEMBERED_SECONDS:
                try:
                    answer = await self._relay.open("HEAD", f"{self._api_url}/", limits=_PATIENCE)
                    answer.close()
                    self._api = "ok"  # any answer: it is reached
                except HypercoreError:
                    self._api = "unreachable"
                self._asked_at = time.monotonic()
            return self._api
