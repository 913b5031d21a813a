"""Whether what the gateway needs answers: store, blob store, Claude API.

All are asked at once, each with a limit of its own, and each is told with how long it took. Answers are remembered, and
callers that come while a dependency is being asked share the question: sandboxes reach `/ready`, and the store is asked
by a write.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from hypercore_agents.api.errors import HypercoreError, Unavailable
from hypercore_agents.kit.relay.relay import Relay, RequestLimits
from hypercore_agents.observability.metrics import GatewayMetrics
from hypercore_agents.security.sealing import KeyRing, SealingError
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import check_key_ring

_log = structlog.get_logger(__name__)
_STORE_REMEMBERED_SECONDS = 1.0
_REMEMBERED_SECONDS = 30.0
LOOK_SECONDS = 15.0
"""Pause between looks for the metrics."""
_STORE_SECONDS = 3.0
_API_SECONDS = 5.0
_PATIENCE = RequestLimits(connect=3, response=_API_SECONDS, idle=_API_SECONDS)


@dataclass(frozen=True)
class _Found:
    """What was found of one dependency, at a time of the monotonic clock. `error` None: it answers."""

    error: str | None
    latency_ms: float
    at: float


class _Remembered:
    """One dependency, asked at most once in `seconds` and by one caller at a time."""

    def __init__(self, name: str, check: Callable[[], Awaitable[None]], seconds: float) -> None:
        self._name = name
        self._check = check
        self._seconds = seconds
        self._found: _Found | None = None
        self._asking: asyncio.Task[_Found] | None = None

    async def found(self) -> _Found:
        if self._found is not None and time.monotonic() - self._found.at < self._seconds:
            return self._found
        if self._asking is None:
            self._asking = asyncio.create_task(_ask(self._check), name=f"gateway.ask-{self._name}")
        asking = self._asking
        self._found = await asyncio.shield(asking)
        if self._asking is asking:
            self._asking = None
        return self._found


class Health:
    """Looks at the gateway's dependencies. `ring` gives the key ring as it is then."""

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        relay: Relay,
        api_url: str,
        ring: Callable[[], KeyRing],
        metrics: GatewayMetrics,
    ) -> None:
        self._database = database
        self._relay = relay
        self._api_url = api_url
        self._ring = ring
        self._metrics = metrics
        self._store = _Remembered("store", self._ask_store, _STORE_REMEMBERED_SECONDS)
        self._key_ring = _Remembered("key-ring", self._ask_key_ring, _STORE_REMEMBERED_SECONDS)
        self._blobs = _Remembered("blobs", blobs.check, _REMEMBERED_SECONDS)
        self._api = _Remembered("api", self._reach_api, _REMEMBERED_SECONDS)

    async def require_store(self) -> None:
        """Raise Unavailable when the store takes no writes, or when its key ring is not this gateway's."""
        for dependency in (self._store, self._key_ring):
            if (error := (await dependency.found()).error) is not None:
                raise Unavailable(error)

    async def report(self) -> tuple[dict[str, Any], bool]:
        """Return each dependency's state and latency by name, and whether the gateway can serve at all."""
        store, ring, blobs, api = await asyncio.gather(
            self._store.found(), self._key_ring.found(), self._blobs.found(), self._api.found()
        )
        found = {"store": store, "key_ring": ring, "blobs": blobs, "claude_api": api}
        serving = store.error is None and ring.error is None
        status = "unavailable" if not serving else "ok" if blobs.error is None and api.error is None else "degraded"
        words = {"store": "unavailable", "key_ring": "wrong", "blobs": "unavailable", "claude_api": "unreachable"}
        states = {name: "ok" if one.error is None else words[name] for name, one in found.items()}
        report = {
            "status": status,
            "dependencies": states,
            "latency_ms": {name: one.latency_ms for name, one in found.items()},
            "errors": {name: one.error for name, one in found.items() if one.error is not None},
        }
        return report, serving

    async def look(self) -> None:
        """Show in the metrics which dependencies answer. The Claude API is asked by nobody but who wants to know."""
        for name, dependency in (("store", self._store), ("key_ring", self._key_ring), ("blobs", self._blobs)):
            self._metrics.dependency_up.labels(name).set((await dependency.found()).error is None)

    async def _ask_store(self) -> None:
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                await self._database.check_writes()
        except TimeoutError:
            raise Unavailable("the store does not answer") from None

    async def _ask_key_ring(self) -> None:
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                await check_key_ring(self._database, self._ring())
        except (TimeoutError, Unavailable):
            return  # the store is the fault, and is told as such
        except SealingError as error:
            raise Unavailable(str(error)) from None

    async def _reach_api(self) -> None:
        async with asyncio.timeout(_API_SECONDS):
            answer = await self._relay.open("HEAD", f"{self._api_url}/", limits=_PATIENCE)
        answer.close()  # any answer: it is reached


async def _ask(check: Callable[[], Awaitable[None]]) -> _Found:
    started = time.perf_counter()
    error = None
    try:
        await check()
    except TimeoutError:
        error = "no answer in time"
    except HypercoreError as failed:
        error = failed.message
    except Exception:
        _log.exception("health.check_defect")
        error = "the check failed; see the log"
    return _Found(error, round((time.perf_counter() - started) * 1000, 2), time.monotonic())
