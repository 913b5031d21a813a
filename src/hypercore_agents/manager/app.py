"""The manager's ASGI application, and the functions that serve it."""

import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog
from fastapi import APIRouter, FastAPI
from fastapi_offline import FastAPIOffline

from hypercore_agents import __version__
from hypercore_agents.compute.base import ComputeBackend
from hypercore_agents.compute.registry import open_backend
from hypercore_agents.http.context import App, RequestContext, Scope
from hypercore_agents.http.errors import ERROR_RESPONSES, install_error_handlers
from hypercore_agents.http.serve import bind, parse_address, serve
from hypercore_agents.kit.environment import make_state_dir
from hypercore_agents.manager.composition import Manager, SharedAddress
from hypercore_agents.manager.http.agent_relay import agent_relay_router
from hypercore_agents.manager.http.agents import agents_router
from hypercore_agents.manager.http.approvals import approvals_router
from hypercore_agents.manager.http.bodies import BodyLimits
from hypercore_agents.manager.http.chat import chat_router
from hypercore_agents.manager.http.events import events_router
from hypercore_agents.manager.http.files import files_router
from hypercore_agents.manager.http.front_door import FrontDoor
from hypercore_agents.manager.http.health import health_router
from hypercore_agents.manager.http.pool import pool_router
from hypercore_agents.manager.http.prometheus import prometheus_router
from hypercore_agents.manager.http.sessions import sessions_router
from hypercore_agents.manager.http.usage import usage_router
from hypercore_agents.manager.settings import ManagerSettings, warnings_about
from hypercore_agents.manager.store_startup import open_store
from hypercore_agents.observability.logging import configure_logging
from hypercore_agents.observability.metrics import REQUEST_STATUSES, ManagerMetrics, status_class
from hypercore_agents.store.blobs import Blobs

_log = structlog.get_logger(__name__)

REQUESTS_GRACE = 10.0


def create_app(
    settings: ManagerSettings,
    *,
    backend: ComputeBackend,
    base_url: str | None = None,
    clock: Callable[[], float] = time.time,
    shared: SharedAddress | None = None,
) -> App:
    """Return the manager as an ASGI application; its lifespan starts and stops everything.

    `base_url`: the manager's public URL without BASE_DOMAIN, by default LISTEN_ADDR. `shared`: set in a worker that
    shares its address with others.
    """
    make_state_dir(settings.state_dir)
    manager = Manager(settings, backend, base_url or f"http://{settings.listen_addr}", clock, shared)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await manager.start()
            yield
        finally:
            await manager.stop()

    app: FastAPI = FastAPIOffline(
        title="Hypercore Agents",
        version=__version__,
        summary="The Claude Agent SDK for thousands of users, one sandbox per agent",
        lifespan=lifespan,
        redirect_slashes=False,
        responses=ERROR_RESPONSES,
    )
    install_error_handlers(app)
    app.state.authenticator = manager.authenticator
    routers = _routers(manager)
    for router in routers:
        app.include_router(router)
    front_door = FrontDoor(
        BodyLimits(app, manager.authenticator), base_domain=settings.base_domain, authenticated=settings.enable_auth
    )
    return RequestContext(
        front_door,
        trusted_request_id=not settings.enable_auth,
        on_end=_count_in(manager.metrics, routers),
        tracing=manager.tracing,
    )


async def run(
    settings: ManagerSettings, *, listener: socket.socket | None = None, backend: ComputeBackend | None = None
) -> None:
    """Serve until SIGTERM. Raises SettingError or SealingError when a setting cannot be used."""
    announce(settings)
    if listener is None:
        listener = bind(*parse_address(settings.listen_addr, "LISTEN_ADDR"), "LISTEN_ADDR")
    try:
        await check_at_start(settings)
    except BaseException:
        listener.close()
        raise
    await run_on(listener, settings, backend=backend)


async def check_at_start(settings: ManagerSettings) -> None:
    """Check that the state folder, the blob store, the store and its key ring can be used, before serving.

    Raises SettingError or SealingError, with the variable's name.
    """
    make_state_dir(settings.state_dir)
    await Blobs(settings.blob_url, settings.state_dir / "blobs").require()
    await open_store(settings)


def announce(settings: ManagerSettings) -> None:
    """Configure logging, and log warnings about the environment."""
    configure_logging("manager", level=settings.log_level, format=settings.log_format)
    for warning in warnings_about(os.environ, Path(".env")):
        _log.warning("settings.warning", message=warning)


async def run_on(
    listener: socket.socket,
    settings: ManagerSettings,
    *,
    backend: ComputeBackend | None = None,
    shared: SharedAddress | None = None,
) -> None:
    """Serve a bound socket until SIGTERM, or until `shared.stop` is set."""
    with contextlib.closing(listener):
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if backend is None:
            backend = open_backend(settings.compute_backend, settings.state_dir, settings.backend_options)
        app = create_app(settings, backend=backend, base_url=f"http://{shown}:{port}", shared=shared)
        await serve(app, listener, grace=REQUESTS_GRACE, stop=None if shared is None else shared.stop)


def _routers(manager: Manager) -> list[APIRouter]:
    return [
        agents_router(manager.agents, manager.idempotency, (manager.open_streams, manager.open_downloads)),
        chat_router(manager.turns, manager.turn_relay, manager.sessions, manager.relay, manager.idempotency),
        sessions_router(manager.sessions),
        events_router(manager.sessions, manager.event_streams, manager.open_streams),
        approvals_router(manager.sessions, manager.relay),
        files_router(manager.session_opener, manager.relay, manager.open_downloads),
        agent_relay_router(manager.directory, manager.relay),
        pool_router(
            manager.database, manager.shape, manager.backend.capabilities, manager.fleet.rebalance, manager.clock
        ),
        usage_router(manager.database, manager.settings.user_storage_mb << 20),
        prometheus_router(manager.database),
        health_router(manager.health_checks, manager.database, manager.gauges, manager.metrics_page),
    ]


def _count_in(metrics: ManagerMetrics, routers: list[APIRouter]) -> Callable[[Scope, int, float], None]:
    paths = {str(getattr(route, "path", "other")) for router in routers for route in router.routes}
    for path in {"other", *paths}:
        for label in REQUEST_STATUSES:
            metrics.requests.labels(path, label)

    def count(scope: Scope, status: int, _: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        route = route if route in paths else "other"
        metrics.requests.labels(route, status_class(status) if status else "disconnected").inc()
        if (error_type := scope["state"].get("error_type")) is not None:
            metrics.errors.labels(error_type).inc()

    return count
