"""FastAPI routes of the gateway: the agents' internal routes and, on a separate address, the operator's.

Sandboxes reach the internal routes, so these reveal nothing about other agents; metrics and health are only on the
operator's address.
"""

from email.utils import formatdate
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import NotFound
from hypercore_agents.api.events import EVENTS_PAGE, EventsAfter, EventsLimit, SessionEvents, parse_id
from hypercore_agents.api.ids import SessionId
from hypercore_agents.api.internal import (
    AgentToken,
    EnrolRequest,
    EnrolResponse,
    Heartbeat,
    HeartbeatTaken,
    SessionToken,
    SessionTokenRequest,
    Transcript,
    WorkspaceStored,
)
from hypercore_agents.gateway.credentials import Tokens
from hypercore_agents.gateway.enrolment import Enrolment
from hypercore_agents.gateway.health import Health
from hypercore_agents.gateway.internal import AgentServices
from hypercore_agents.gateway.rate_limit_headroom import RateLimitHeadroom
from hypercore_agents.gateway.session_archives import Archives
from hypercore_agents.http.context import App, Receive, Scope, Send
from hypercore_agents.http.errors import ERROR_RESPONSES, TEXT_RESPONSES, install_error_handlers
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.observability.metrics import CONTENT_TYPE, GatewayMetrics, render
from hypercore_agents.observability.tracing import Post
from hypercore_agents.security.bearers import presented


class _Bare(Response):
    """Lets a route answer with an ASGI application."""

    def __init__(self, app: App) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


_Generation = Annotated[int, Query(ge=1, le=2**31)]
_Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]


def internal_app(
    *,
    tokens: Tokens,
    enrolment: Enrolment,
    services: AgentServices,
    archives: Archives,
    health: Health,
    spans: Post | None = None,
    lifespan: Any = None,
) -> FastAPI:
    """Return the application that sandboxes reach, apart from the model routes. It serves no API documentation.

    `spans` forwards agents' spans; None if tracing is off.
    """
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=ERROR_RESPONSES,
    )
    install_error_handlers(app)
    app.include_router(_internal(tokens, enrolment, services, archives, spans))

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def get_ready(response: Response) -> dict[str, str]:
        await health.require_store()
        response.headers["date"] = formatdate(usegmt=True)  # `hypercore-agents doctor` compares clocks
        return {"status": "ready"}

    return app


def operator_app(*, health: Health, metrics: GatewayMetrics, rate_limit_headroom: RateLimitHeadroom) -> FastAPI:
    """Return the application of the operator's address: the health of each dependency, and metrics."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, responses=ERROR_RESPONSES)
    install_error_handlers(app)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def get_health() -> JSONResponse:
        report, serving = await health.report()
        return JSONResponse(report, status_code=200 if serving else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", responses=TEXT_RESPONSES)
    async def get_metrics() -> Response:
        rate_limit_headroom.update_gauges()
        return Response(render(metrics.registry), media_type=CONTENT_TYPE)

    return app


def _internal(
    tokens: Tokens, enrolment: Enrolment, services: AgentServices, archives: Archives, spans: Post | None
) -> APIRouter:
    router = CheckedRouter(prefix="/internal")

    async def agent(authorization: Annotated[str | None, Header()] = None) -> str:
        return tokens.agent(presented(authorization)).agent_id

    caller = Annotated[str, Depends(agent)]

    @router.post("/enrol")
    async def enrol(request: EnrolRequest) -> EnrolResponse:
        return await enrolment.enrol(request)

    @router.post("/agent-token")
    async def agent_token(agent_id: caller) -> AgentToken:
        return await services.renew(agent_id)

    @router.post("/traces")
    async def traces(_: caller, request: Request) -> dict[str, str]:
        """Forward an agent's spans to the collector. They come from a sandbox and must not be trusted."""
        if spans is None:
            raise NotFound("tracing is off")
        await spans(await request.body())
        return {"status": "passed on"}

    @router.post("/heartbeat")
    async def heartbeat(agent_id: caller, beat: Heartbeat) -> HeartbeatTaken:
        return await services.heartbeat(agent_id, beat)

    @router.post("/start-slots", response_model=None, responses=TEXT_RESPONSES)
    async def start_slot(agent_id: caller, wait: bool = True) -> Response:
        """Hold a start slot of this host for a Claude CLI while the response is open."""
        return _Bare(await services.start_slot(agent_id, wait=wait))

    @router.post("/session-tokens")
    async def session_token(agent_id: caller, request: SessionTokenRequest) -> SessionToken:
        return await services.session_token(agent_id, request)

    @router.get("/sessions/{session_id}/transcript")
    async def load(
        agent_id: caller,
        session_id: SessionId,
        generation: _Generation,
        after: Annotated[int | None, Query(ge=0)] = None,
    ) -> Transcript:
        return await archives.load(agent_id, session_id, generation, after)

    @router.get("/sessions/{session_id}/events")
    async def list_events(
        agent_id: caller,
        session_id: SessionId,
        generation: _Generation,
        after: EventsAfter = None,
        limit: EventsLimit = EVENTS_PAGE,
    ) -> SessionEvents:
        return await archives.events(agent_id, session_id, generation, parse_id(after), limit)

    @router.put("/sessions/{session_id}/workspace")
    async def put_workspace(
        agent_id: caller, session_id: SessionId, generation: _Generation, request: Request
    ) -> WorkspaceStored:
        """Store an archive whose digest is known only at its end."""
        return await archives.put_workspace(agent_id, session_id, generation, request.stream())

    @router.put("/sessions/{session_id}/workspaces/{digest}", status_code=204)
    async def put_named_workspace(
        agent_id: caller, session_id: SessionId, digest: _Digest, generation: _Generation, request: Request
    ) -> None:
        """Store an archive as agents of earlier versions send it."""
        await archives.put_workspace(agent_id, session_id, generation, request.stream(), digest=digest)

    @router.get("/sessions/{session_id}/workspaces/{digest}")
    async def get_workspace(
        agent_id: caller, session_id: SessionId, digest: _Digest, generation: _Generation
    ) -> StreamingResponse:
        chunks = await archives.get_workspace(agent_id, session_id, generation, digest)
        return StreamingResponse(chunks, media_type="application/octet-stream")

    @router.get("/sessions/{session_id}/turns/{turn}/usage")
    async def turn_usage(
        agent_id: caller,
        session_id: SessionId,
        turn: Annotated[int, Path(ge=1, le=2**31)],
        generation: _Generation,
    ) -> Usage:
        return await services.turn_usage(agent_id, session_id, turn, generation)

    return router
