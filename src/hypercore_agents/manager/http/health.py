"""Health, readiness and metrics. Nothing here waits for long: each dependency has its own time limit.

`/health` says what it found of each dependency: 200 when all that the platform cannot do without answer, else 503. The
store is asked by a write: a full disk still reads. The answer is remembered for a second, so that a thousand callers
cost one check; the manager asks every `LOOK_SECONDS` by itself, for its metrics. `/ready` asks the store alone: a
manager whose gateway is down still lists, deletes and explains.
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
LOOK_SECONDS = 15.0
FRESH_SECONDS = 1.0


@dataclass(frozen=True)
class Dependency:
    """Something that is asked whether it is there. `check` raises when it is not."""

    name: str
    check: Callable[[], Awaitable[object]]
    required: bool = True
    seconds: float | None = None
    """How long the check may take; None: `CHECK_SECONDS`."""


class DependencyHealth(BaseModel):
    """What was found of one dependency."""

    status: Literal["ok", "failing"]
    required: bool
    latency_ms: float
    error: str | None = None


class Health(BaseModel):
    """Answer of `/health`. `degraded`: only what the platform can do without is failing."""

    status: Literal["ok", "degraded", "failing"]
    dependencies: dict[str, DependencyHealth]


class HealthChecks:
    """Asks all dependencies at once, each with a time limit of its own. `show` gets what was found of each."""

    def __init__(self, dependencies: list[Dependency], show: Callable[[str, bool], None] = lambda *_: None) -> None:
        self._dependencies = dependencies
        self._show = show
        self._lock = asyncio.Lock()
        self._found: tuple[float, Health] | None = None

    async def run(self) -> Health:
        """Return what is found now, or was found within the last second."""
        async with self._lock:
            if self._found is not None and time.monotonic() - self._found[0] < FRESH_SECONDS:
                return self._found[1]
            results = await asyncio.gather(*(self._ask(dependency) for dependency in self._dependencies))
            found = {dependency.name: result for dependency, result in zip(self._dependencies, results, strict=True)}
            failing = [result for result in results if result.status == "failing"]
            status: Literal["ok", "degraded", "failing"] = (
                "failing" if any(result.required for result in failing) else "degraded" if failing else "ok"
            )
            for name, result in found.items():
                self._show(name, result.status == "ok")
            health = Health(status=status, dependencies=found)
            self._found = (time.monotonic(), health)
            return health

    async def _ask(self, dependency: Dependency) -> DependencyHealth:
        started = time.perf_counter()
        seconds = CHECK_SECONDS if dependency.seconds is None else dependency.seconds
        error = None
        try:
            async with asyncio.timeout(seconds):
                await dependency.check()
        except TimeoutError:
            error = f"no answer within {seconds:g} s"
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
    """Return `/health`, `/ready` and `/metrics`, whose text `page` gives."""
    router = CheckedRouter(tags=["health"])

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses={503: {"model": Health, "description": "What is needed does not answer."}})
    async def health(response: Response) -> Health:
        """Say of each dependency whether it answers, and how quickly."""
        found = await checks.run()
        response.status_code = 503 if found.status == "failing" else 200
        return found

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready(response: Response) -> dict[str, str]:
        """Say whether this manager takes requests."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await database.check()
        except TimeoutError:
            raise Unavailable(f"the store did not answer within {CHECK_SECONDS:g} s") from None
        response.headers["date"] = formatdate(usegmt=True)  # for `doctor`, which compares clocks
        return {"status": "ready"}

    @router.head("/metrics", include_in_schema=False, response_model=None)
    @router.get("/metrics", response_model=None, responses=TEXT_RESPONSES)
    async def metrics_page(caller: MetricsReader) -> Response:
        """Give metrics in Prometheus' text format."""
        caller.needs_metrics()
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await gauges.refresh()
        except (TimeoutError, Unavailable):
            _log.warning("metrics.store_unavailable")  # counters are still worth a scrape
        return Response(page(), media_type=CONTENT_TYPE)

    return router
