"""Composition root of the autoscaler, and its HTTP routes: decisions, metrics, health, readiness."""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import aiohttp
from fastapi import FastAPI, Query, Response
from prometheus_client import CollectorRegistry

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.api.pool import ScalingDecisions
from hypercore_agents.autoscaler.json_client import JsonClient
from hypercore_agents.autoscaler.loop import Autoscaler
from hypercore_agents.autoscaler.pool_client import PoolClient
from hypercore_agents.autoscaler.settings import AutoscalerSettings
from hypercore_agents.autoscaler.signals import ManagerSignals, PrometheusSignals, SignalSource
from hypercore_agents.http.context import App, RequestContext
from hypercore_agents.http.errors import ERROR_RESPONSES, install_error_handlers
from hypercore_agents.http.serve import bind, parse_address, serve
from hypercore_agents.observability.logging import configure_logging
from hypercore_agents.observability.metrics import CONTENT_TYPE, AutoscalerMetrics, render

_GRACE_SECONDS = 5.0


def build(settings: AutoscalerSettings, http: aiohttp.ClientSession, metrics: AutoscalerMetrics) -> Autoscaler:
    """Build the autoscaler from its settings."""
    token = settings.autoscaler_token
    manager = JsonClient(
        http,
        settings.manager_url,
        name="the manager",
        remedy="check MANAGER_URL and AUTOSCALER_TOKEN",
        timeout=settings.autoscaler_timeout,
        headers={"Authorization": f"Bearer {token.get_secret_value()}"} if token else None,
    )
    signals: SignalSource = ManagerSignals(manager)
    if settings.autoscaler_signals == "prometheus":
        prometheus = JsonClient(
            http,
            settings.prometheus_url,
            name="Prometheus",
            remedy="check PROMETHEUS_URL",
            timeout=settings.autoscaler_timeout,
        )
        signals = PrometheusSignals(prometheus, longest_age=settings.signals_max_age)
    return Autoscaler(
        PoolClient(manager),
        signals,
        settings.policy(),
        metrics,
        retained_decisions=settings.autoscaler_decisions,
        dry_run=settings.autoscaler_dry_run,
    )


def create_app(settings: AutoscalerSettings) -> App:
    """Return the ASGI application; its lifespan runs the loop."""
    metrics = AutoscalerMetrics(CollectorRegistry())
    parts: dict[str, Autoscaler] = {}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession() as http:
            autoscaler = parts["autoscaler"] = build(settings, http, metrics)
            autoscaler.start()
            try:
                yield
            finally:
                await autoscaler.close()

    app = FastAPI(
        title="Hypercore autoscaler",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERROR_RESPONSES,
    )
    install_error_handlers(app)

    @app.get("/v1/autoscaler/decisions", summary="The newest decisions with their reasons, newest first")
    async def decisions(limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> ScalingDecisions:
        return parts["autoscaler"].decisions(limit)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="State of the loop and of each dependency")
    async def health() -> Any:
        problems = parts["autoscaler"].problems()
        if problems["loop"] is not None:
            raise Unavailable(problems["loop"], details=problems)
        checks = {name: {"ok": problem is None, "problem": problem} for name, problem in problems.items()}
        degraded = any(problem is not None for problem in problems.values())
        return {"status": "degraded" if degraded else "ok", "dry_run": settings.autoscaler_dry_run, "checks": checks}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", summary="Whether the last step read the signals and the manager")
    async def ready() -> Any:
        problems = {name: problem for name, problem in parts["autoscaler"].problems().items() if problem is not None}
        if problems:
            name, problem = next(iter(problems.items()))
            raise Unavailable(f"{name}: {problem}", details=problems)
        return {"status": "ready"}

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", summary="Metrics in Prometheus' text format")
    async def exposition() -> Response:
        return Response(render(metrics.registry), media_type=CONTENT_TYPE)

    return RequestContext(app, max_body=64 * 1024)


async def run(settings: AutoscalerSettings) -> None:
    """Serve until SIGTERM. Raises AddressError if the address cannot be bound."""
    configure_logging("autoscaler", level=settings.log_level, format=settings.log_format)
    host, port = parse_address(settings.autoscaler_addr, "AUTOSCALER_ADDR")
    await serve(create_app(settings), bind(host, port, "AUTOSCALER_ADDR"), grace=_GRACE_SECONDS)
