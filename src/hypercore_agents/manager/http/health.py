"""Routes of health, readiness and metrics. Each check of a dependency has its own time limit.

`/health` reports on each dependency: status 200 if all required ones respond, 503 otherwise. The store is checked with
a write, because a full disk still serves reads. The result is cached for a second, so that a thousand callers cost one
check; the manager also runs the checks every `INTERVAL_SECONDS`, for its metrics. `/ready` checks only the store: a
manager without a gateway can still list and delete agents.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Literal

import structlog
from fastapi import APIRouter, Response
from pydantic import BaseModel

from hypercore_agents.api.errors import HypercoreError, Unavailable
from hypercore_agents.http.errors import TEXT_RESPONSES
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.manager.http.auth import MetricsReader
from hypercore_agents.manager.http.gauges import StoreGauges
from hypercore_agents.observability.metrics import CONTENT_TYPE
from hypercore_agents.store.database import Database

_log = structlog.get_logger(__name__)

CHECK_SECONDS = 2.0
INTERVAL_SECONDS = 15.0
CACHE_SECONDS = 1.0


@dataclass(frozen=True)
class Dependency:
    """A service that the manager depends on. `check` raises if it does not respond."""

    name: str
    check: Callable[[], Awaitable[object]]
    required: bool = True
    seconds: float | None = None
    """Maximum time of the check. None: `CHECK_SECONDS`."""


class DependencyHealth(BaseModel):
    """Result of the check of one dependency."""

    status: Literal["ok", "failing"]
    required: bool
    latency_ms: float
    error: str | None = None


class Health(BaseModel):
    """Response of `/health`. `degraded`: only dependencies that are not required are failing."""

    status: Literal["ok", "degraded", "failing"]
    dependencies: dict[str, DependencyHealth]


class HealthChecks:
    """Checks all dependencies concurrently, each with its own time limit. `show` receives each result."""

    def __init__(self, dependencies: list[Dependency], show: Callable[[str, bool], None] = lambda *_: None) -> None:
        self._dependencies = dependencies
        self._show = show
        self._lock = asyncio.Lock()
        self._cached: tuple[float, Health] | None = None

    async def run(self) -> Health:
        """Run the checks, or return the results of the last second."""
        async with self._lock:
            if self._cached is not None and time.monotonic() - self._cached[0] < CACHE_SECONDS:
                return self._cached[1]
            results = await asyncio.gather(*(self._check(dependency) for dependency in self._dependencies))
            found = {dependency.name: result for dependency, result in zip(self._dependencies, results, strict=True)}
            failing = [result for result in results if result.status == "failing"]
            status: Literal["ok", "degraded", "failing"] = (
                "failing" if any(result.required for result in failing) else "degraded" if failing else "ok"
            )
            for name, result in found.items():
                self._show(name, result.status == "ok")
            health = Health(status=status, dependencies=found)
            self._cached = (time.monotonic(), health)
            return health

    async def _check(self, dependency: Dependency) -> DependencyHealth:
        started = time.perf_counter()
        seconds = CHECK_SECONDS if dependency.seconds is None else dependency.seconds
        error = None
        try:
            async with asyncio.timeout(seconds):
                await dependency.check()
        except TimeoutError:
            error = f"no response within {seconds:g} s"
        except HypercoreError as found:
            error = found.message
        except Exception:
            _log.exception("health.check_defect", dependency=dependency.name)
            error = "the check failed; see the log"
        return DependencyHealth(
            status="ok" if error is None else "failing",
            required=dependency.required,
            latency_ms=round((time.perf_counter() - started) * 1000, 2),
            error=error,
        )


def health_router(
    checks: HealthChecks,
    database: Database,
    gauges: StoreGauges,
    page: Callable[[], bytes],
) -> APIRouter:
    """Return the routes `/health`, `/ready` and `/metrics`. `page` returns the text of the metrics."""
    router = CheckedRouter(tags=["health"])

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses={503: {"model": Health, "description": "A required dependency does not respond."}})
    async def health(response: Response) -> Health:
        """Report for each dependency whether it responds, and its latency."""
        found = await checks.run()
        response.status_code = 503 if found.status == "failing" else 200
        return found

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready(response: Response) -> dict[str, str]:
        """Report whether this manager accepts requests."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await database.check()
        except TimeoutError:
            raise Unavailable(f"the store did not respond within {CHECK_SECONDS:g} s") from None
        response.headers["date"] = formatdate(usegmt=True)  # `doctor` compares clocks
        return {"status": "ready"}

    @router.head("/metrics", include_in_schema=False, response_model=None)
    @router.get("/metrics", response_model=None, responses=TEXT_RESPONSES)
    async def metrics_page(caller: MetricsReader) -> Response:
        """Return the metrics in the text format of Prometheus."""
        caller.needs_metrics()
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await gauges.refresh()
        except (TimeoutError, Unavailable):
            _log.warning("metrics.store_unavailable")  # the counters are still correct
        return Response(page(), media_type=CONTENT_TYPE)

    return router
