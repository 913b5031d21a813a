"""Composition root of the agent server: builds the ASGI application and serves it until SIGTERM."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI

from hypercore_agents.agent.claude.environment import scrub
from hypercore_agents.agent.launcher.client import LauncherClient
from hypercore_agents.agent.server.metrics_port import serve_metrics
from hypercore_agents.agent.server.routes import build_router, endpoint_of
from hypercore_agents.agent.server.server import AgentServer
from hypercore_agents.agent.settings import AgentSettings
from hypercore_agents.api.errors import ErrorBody
from hypercore_agents.http.context import App, Receive, RequestContext, Scope, Send, header
from hypercore_agents.http.errors import install_error_handlers
from hypercore_agents.http.serve import bind, inherited, serve
from hypercore_agents.observability.logging import configure_logging
from hypercore_agents.observability.metrics import status_class

_PUBLIC = frozenset({"/health", "/ready"})
_FINISH_SECONDS = 5.0
"""After the drain, how long responses may take to reach their clients."""


class _BearerGuard:
    """Rejects requests without the manager's bearer, except for health and readiness checks."""

    def __init__(self, app: App, server: AgentServer) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _PUBLIC:
            self._server.authenticate(header(scope, "authorization"))
        await self._app(scope, receive, send)


class AgentApplication:
    """The agent's routes. They are built before the server exists, since building them takes most of an agent's start.

    An application serves one server after another, never two at a time.
    """

    def __init__(self) -> None:
        self._server: AgentServer | None = None
        self._routes = FastAPI(
            title="Hypercore agent",
            lifespan=self._lifespan,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            responses={"default": {"model": ErrorBody}},
        )
        install_error_handlers(self._routes)
        self._routes.include_router(build_router(self._current))

    def for_server(self, server: AgentServer) -> App:
        """Return this server's ASGI application; its lifespan enrols at startup and ends all sessions at shutdown."""
        self._server = server

        def count(scope: Scope, status: int, seconds: float) -> None:
            endpoint = endpoint_of(scope)
            if endpoint is not None:
                status = scope["state"].get("outcome", status)
                label = status_class(status) if status else "disconnected"
                server.metrics.requests.labels(endpoint, label).inc()
                server.metrics.request_seconds.labels(endpoint).observe(seconds)

        return RequestContext(_BearerGuard(self._routes, server), on_end=count, tracing=server.tracing)

    def _current(self) -> AgentServer:
        assert self._server is not None
        return self._server

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        server = self._current()
        server.start()
        try:
            yield
        finally:
            await server.close()


def create_app(server: AgentServer) -> App:
    """Return the ASGI application of one server."""
    return AgentApplication().for_server(server)


async def run(
    settings: AgentSettings,
    *,
    announce: Callable[[], None] = lambda: None,
    application: AgentApplication | None = None,
) -> None:
    """Serve one agent from enrolment to SIGTERM; `announce` is called once it is enrolled and accepts turns.

    `application` is one that was built earlier; by default, one is built here.
    Raises EnrolmentFailed, and AddressError when the server cannot listen.
    """
    configure_logging("agent", level=settings.log_level, format=settings.log_format)
    # the SDK logs parts of what its CLI prints, which may contain anything
    logging.getLogger("claude_agent_sdk").setLevel(logging.CRITICAL)
    launcher = LauncherClient.inherited(os.environ)
    scrub(os.environ)
    if settings.agent_listen_fd is not None:
        listener = inherited(settings.agent_listen_fd)
    else:
        listener = bind(settings.agent_host, settings.agent_port, "AGENT_HOST and AGENT_PORT")
    server = AgentServer(settings, launcher, on_serving=announce)
    async with serve_metrics(server.render_metrics, settings.agent_host, settings.metrics_port):
        app = (application or AgentApplication()).for_server(server)
        await serve(app, listener, grace=_FINISH_SECONDS, drain=server.drain, stop=server.failed)
    if server.failure is not None:
        raise server.failure
