"""Health checks of the gateway's dependencies: store, key ring, blob store, Claude API.

The checks run concurrently, each with its own time limit, and each result has its latency. Results are cached, and
concurrent callers share a running check: sandboxes can send requests to `/ready`, and the store's check is a write.
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
_STORE_CACHE_SECONDS = 1.0
_CACHE_SECONDS = 30.0
UPDATE_SECONDS = 15.0
"""Pause between two updates of the metrics."""
_STORE_SECONDS = 3.0
_API_SECONDS = 5.0
_API_LIMITS = RequestLimits(connect=3, response=_API_SECONDS, idle=_API_SECONDS)


@dataclass(frozen=True)
class _CheckResult:
    """Result of a check, at a time of the monotonic clock. `error` None: the dependency works."""

    error: str | None
    latency_ms: float
    at: float


class _CachedCheck:
    """The check of one dependency, run at most once in `seconds` and for all callers together."""

    def __init__(self, name: str, check: Callable[[], Awaitable[None]], seconds: float) -> None:
        self._name = name
        self._check = check
        self._seconds = seconds
        self._result: _CheckResult | None = None
        self._running: asyncio.Task[_CheckResult] | None = None

    async def result(self) -> _CheckResult:
        if self._result is not None and time.monotonic() - self._result.at < self._seconds:
            return self._result
        if self._running is None:
            self._running = asyncio.create_task(_run(self._check), name=f"gateway.check-{self._name}")
        running = self._running
        self._result = await asyncio.shield(running)
        if self._running is running:
            self._running = None
        return self._result


class Health:
    """Checks the gateway's dependencies. `ring` returns the current key ring."""

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
        self._store = _CachedCheck("store", self._check_store, _STORE_CACHE_SECONDS)
        self._key_ring = _CachedCheck("key-ring", self._check_key_ring, _STORE_CACHE_SECONDS)
        self._blobs = _CachedCheck("blobs", blobs.check, _CACHE_SECONDS)
        self._api = _CachedCheck("api", self._check_api, _CACHE_SECONDS)

    async def require_store(self) -> None:
        """Raise Unavailable if the store accepts no writes or has another key ring than this gateway."""
        for dependency in (self._store, self._key_ring):
            if (error := (await dependency.result()).error) is not None:
                raise Unavailable(error)

    async def report(self) -> tuple[dict[str, Any], bool]:
        """Return the state and latency of each dependency, and whether the gateway can serve requests."""
        store, ring, blobs, api = await asyncio.gather(
            self._store.result(), self._key_ring.result(), self._blobs.result(), self._api.result()
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

    async def update_metrics(self) -> None:
        """Set the metrics of all dependencies except the Claude API, which only a request to `/health` checks."""
        for name, dependency in (("store", self._store), ("key_ring", self._key_ring), ("blobs", self._blobs)):
            self._metrics.dependency_up.labels(name).set((await dependency.result()).error is None)

    async def _check_store(self) -> None:
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                await self._database.check_writes()
        except TimeoutError:
            raise Unavailable("the store does not answer") from None

    async def _check_key_ring(self) -> None:
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                await check_key_ring(self._database, self._ring())
        except (TimeoutError, Unavailable):
            return  # the store's own check reports this
        except SealingError as error:
            raise Unavailable(str(error)) from None

    async def _check_api(self) -> None:
        async with asyncio.timeout(_API_SECONDS):
            answer = await self._relay.open("HEAD", f"{self._api_url}/", limits=_API_LIMITS)
        answer.close()  # any answer shows that the API is reachable


async def _run(check: Callable[[], Awaitable[None]]) -> _CheckResult:
    started = time.perf_counter()
    error = None
    try:
        await check()
    except TimeoutError:
        error = "no answer within the time limit"
    except HypercoreError as failed:
        error = failed.message
    except Exception:
        _log.exception("health.check_defect")
        error = "the check failed; see the log"
    return _CheckResult(error, round((time.perf_counter() - started) * 1000, 2), time.monotonic())
