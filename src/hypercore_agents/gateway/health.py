"""Whether what the gateway needs answers: the store (asked each time), the Claude API (at most twice a minute).

Both are asked at once, each with a limit of its own, and each is told with how long it took. Whoever asks while the
Claude API is being asked does not wait in a queue: all share the one question.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from hypercore_agents.api.errors import HypercoreError, Unavailable
from hypercore_agents.kit.relay import Limits, Relay
from hypercore_agents.security.sealing import KeyRing, SealingError
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import check_key_ring

_REMEMBERED_SECONDS = 30.0
_STORE_SECONDS = 3.0
_API_SECONDS = 5.0
_PATIENCE = Limits(connect=3, answer=_API_SECONDS, idle=_API_SECONDS)


@dataclass(frozen=True)
class _Found:
    """What was found of one dependency, at a time of the monotonic clock."""

    status: str
    latency_ms: float
    at: float


class Health:
    """Looks at the gateway's dependencies."""

    def __init__(self, database: Database, relay: Relay, api_url: str, ring: Callable[[], KeyRing]) -> None:
        self._database = database
        self._ring = ring
        self._relay = relay
        self._api_url = api_url
        self._api: _Found | None = None
        self._asking: asyncio.Task[_Found] | None = None

    async def require_store(self) -> None:
        """Raise Unavailable when the store does not answer in time, or has another key ring than this gateway."""
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                await self._database.check()
                await check_key_ring(self._database, self._ring())
        except TimeoutError:
            raise Unavailable("the store does not answer") from None
        except SealingError as error:
            raise Unavailable(str(error)) from None

    async def report(self) -> tuple[dict[str, Any], bool]:
        """Return each dependency's state and latency by name, and whether the gateway can serve at all."""
        store, api = await asyncio.gather(_ask(self.require_store, "unavailable"), self._claude_api())
        serving = store.status == "ok"
        status = "ok" if serving and api.status == "ok" else "degraded" if serving else "unavailable"
        found = {"store": store, "claude_api": api}
        latencies = {name: one.latency_ms for name, one in found.items()}
        states = {name: one.status for name, one in found.items()}
        return {"status": status, "dependencies": states, "latency_ms": latencies}, serving

    async def _claude_api(self) -> _Found:
        if self._api is not None and time.monotonic() - self._api.at < _REMEMBERED_SECONDS:
            return self._api
        if self._asking is None:
            self._asking = asyncio.create_task(_ask(self._reach_api, "unreachable"), name="gateway.ask-api")
        asking = self._asking
        self._api = await asyncio.shield(asking)
        if self._asking is asking:
            self._asking = None
        return self._api

    async def _reach_api(self) -> None:
        async with asyncio.timeout(_API_SECONDS):
            answer = await self._relay.open("HEAD", f"{self._api_url}/", limits=_PATIENCE)
        answer.close()  # any answer: it is reached


async def _ask(check: Callable[[], Awaitable[None]], otherwise: str) -> _Found:
    started = time.perf_counter()
    status = "ok"
    try:
        await check()
    except (HypercoreError, TimeoutError):
        status = otherwise
    return _Found(status, round((time.perf_counter() - started) * 1000, 2), time.monotonic())
