"""The gateway's composition root: builds all of its parts once and connects them."""

import contextlib
import os
import re
from collections.abc import AsyncIterator

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from hypercore_agents.api.errors import NotFound, Unavailable
from hypercore_agents.api.internal import TRANSCRIPT_LINE_LIMIT
from hypercore_agents.gateway.bodies import Bodies
from hypercore_agents.gateway.credentials import NOTE_SECONDS, Credentials, Pseudonyms, Tokens
from hypercore_agents.gateway.enrolment import Enrolment
from hypercore_agents.gateway.health import UPDATE_SECONDS, Health
from hypercore_agents.gateway.internal import AgentServices
from hypercore_agents.gateway.ledger_retry import RETRY_SECONDS, LedgerRetry
from hypercore_agents.gateway.model import ROUTES, ModelLimits, ModelRoutes
from hypercore_agents.gateway.model_responses import Charging
from hypercore_agents.gateway.pricing import PriceList
from hypercore_agents.gateway.rate_limit_headroom import PUBLISH_SECONDS, RateLimitHeadroom
from hypercore_agents.gateway.request_rules import Policy
from hypercore_agents.gateway.routes import internal_app, operator_app
from hypercore_agents.gateway.session_archives import Archives
from hypercore_agents.gateway.settings import GatewaySettings
from hypercore_agents.gateway.start_slots import StartSlots
from hypercore_agents.gateway.transcript_append import TranscriptAppendRoute
from hypercore_agents.http.context import (
    App,
    Receive,
    RequestContext,
    Scope,
    Send,
    header,
    request_id_of,
    send_error,
)
from hypercore_agents.http.serve import bind, parse_address, serve, serve_beside
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.environment import make_state_dir
from hypercore_agents.kit.relay.relay import Peer, Relay
from hypercore_agents.kit.relay.upstream import unused_proxies
from hypercore_agents.observability.logging import configure_logging
from hypercore_agents.observability.metrics import GatewayMetrics
from hypercore_agents.observability.tracing import FLUSH_SECONDS, Tracing, collector, open_tracing
from hypercore_agents.security.bearers import presented
from hypercore_agents.security.sealing import KeyRing, KeyRingFile, Sealer
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import require_key_ring
from hypercore_agents.store.schema import migrate, require_store

_log = structlog.get_logger(__name__)
_INTERNAL_BODY_LIMIT = 64 * 1024
_TRANSCRIPT_BODY_LIMIT = 6 * TRANSCRIPT_LINE_LIMIT
_CANONICAL = re.compile(rb"(/[A-Za-z0-9_-]+)+")
_ANY_SIZE = 1 << 62


class _AgentGuard:
    """Checks the agent token of internal requests before their bodies are read, except for an enrolment."""

    def __init__(self, app: App, tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/internal/") and scope["path"] != "/internal/enrol":
            self._tokens.agent(presented(header(scope, "authorization")))
        await self._app(scope, receive, send)


class GatewayApp:
    """Dispatches requests to the parts of the gateway. Rejects paths with escapes or with empty or dotted segments."""

    def __init__(
        self,
        model: App,
        internal: App,
        appending: App,
        operator: App,
        metrics: GatewayMetrics,
        tracing: Tracing | None,
    ) -> None:
        self.operator = RequestContext(operator, trusted_request_id=False)
        """Health and metrics; served on an address that no sandbox can reach."""
        # the model routes limit bodies themselves
        self._model = RequestContext(model, max_body=_ANY_SIZE, trusted_request_id=False, tracing=tracing)
        self._internal = RequestContext(internal, max_body=_INTERNAL_BODY_LIMIT, trusted_request_id=True)
        self._transcripts = RequestContext(appending, max_body=_TRANSCRIPT_BODY_LIMIT, trusted_request_id=True)
        self._workspaces = RequestContext(internal, max_body=_ANY_SIZE, trusted_request_id=True)
        self._nowhere = RequestContext(self._refuse, trusted_request_id=False)
        self._lifespan = internal
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            raw = bytes(scope.get("raw_path") or scope["path"].encode())
            if _CANONICAL.fullmatch(raw) is None or raw != scope["path"].encode():
                await self._nowhere(scope, receive, send)
            elif scope["path"] in ROUTES:
                await self._model(scope, receive, send)
            elif scope["path"].startswith("/v1"):
                await self._nowhere(scope, receive, send)
            else:
                await self._inside(scope["path"])(scope, receive, send)

    def _inside(self, path: str) -> App:
        if path.startswith("/internal/sessions/"):
            if path.endswith("/transcript"):
                return self._transcripts
            if "/workspaces/" in path or path.endswith("/workspace"):
                return self._workspaces
        return self._internal

    async def _refuse(self, scope: Scope, _: Receive, send: Send) -> None:
        self._metrics.refusals.labels("route").inc()
        offered = ", ".join(f"{method} {path}" for path, method in ROUTES.items())
        await send_error(send, NotFound(f"not found; the gateway's model routes are {offered}"), request_id_of(scope))


def create_app(settings: GatewaySettings) -> GatewayApp:
    """Build the gateway. Its lifespan upgrades the store's schema and, at the end, closes all resources.

    Raises SealingError, DatabaseUrlError or PriceFileError, which say what to change.
    """
    make_state_dir(settings.state_dir)
    KeyRing.load_or_create(settings.key_path)
    ring = KeyRingFile(settings.key_path)
    sealer = Sealer(ring)
    database = Database(settings.store_url)
    blobs = Blobs(settings.blob_url, settings.state_dir / "blobs")
    prices = PriceList.load(settings.model_prices)
    metrics = GatewayMetrics(CollectorRegistry(), prices.names)
    tasks = Tasks("gateway")
    rate_limit_headroom = RateLimitHeadroom(metrics, database)
    ledger_retry = LedgerRetry(database)
    tracing = open_tracing("gateway", on=settings.otlp_endpoint is not None, share=settings.trace_share)
    loops = Tasks("gateway-loops")
    relay = Relay(peer=Peer("the Claude API", lambda message: Unavailable(message, retry_after=1)))
    tokens = Tokens(ring, agent_seconds=settings.agent_token_seconds, session_seconds=settings.session_token_seconds)
    key = settings.anthropic_api_key
    bodies = Bodies(settings.model_bodies_mb * 2**20)
    model = ModelRoutes(
        api_url=settings.claude_api_url,
        relay=relay,
        tokens=tokens,
        credentials=Credentials(
            database,
            sealer,
            platform_key=key.get_secret_value() if key else None,
            allow_platform_key=settings.allow_platform_key,
        ),
        pseudonyms=Pseudonyms(ring),
        charging=Charging(database, prices, metrics, tasks, rate_limit_headroom, ledger_retry),
        tracing=tracing,
        bodies=bodies,
        limits=ModelLimits(
            policy=Policy(
                models=settings.allowed_models,
                betas=frozenset(settings.allowed_betas),
                server_tools=frozenset(settings.allowed_server_tools),
            ),
            default_model=settings.claude_model,
            requests_per_session=settings.model_requests_per_session,
            seconds=settings.model_request_seconds,
        ),
    )

    async def send_spans() -> None:
        if tracing is not None and post is not None:
            await tracing.flush(post)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await migrate(database)
        await tokens.note_signing(database)
        loops.repeat("signing", lambda: tokens.note_signing(database), every=NOTE_SECONDS)
        loops.repeat("health", health.update_metrics, every=UPDATE_SECONDS)
        loops.repeat("headroom", rate_limit_headroom.publish, every=PUBLISH_SECONDS)
        loops.repeat("ledger", ledger_retry.try_write, every=RETRY_SECONDS)
        if tracing is not None:
            loops.repeat("traces", send_spans, every=FLUSH_SECONDS)
        try:
            yield
        finally:
            await loops.close()
            bodies.close()
            await tasks.finish(within=10)
            await ledger_retry.try_write()
            await send_spans()
            await to_collector.close()
            await relay.close()
            await database.close()

    to_collector = Relay(peer=Peer("the trace collector", Unavailable), connections=8)
    post = collector(to_collector, settings.otlp_endpoint) if settings.otlp_endpoint is not None else None
    health = Health(database, blobs, relay, settings.claude_api_url, ring, metrics)
    archives = Archives(
        database,
        blobs,
        workspace_bytes=settings.workspace_max_mb * 2**20,
        transcript_bytes=settings.transcript_max_mb * 2**20,
        user_bytes=settings.user_storage_mb * 2**20,
    )
    routes = internal_app(
        tokens=tokens,
        enrolment=Enrolment(database, sealer, tokens, metrics),
        services=AgentServices(database, tokens, StartSlots(settings.starts_per_host)),
        archives=archives,
        health=health,
        spans=post,
        lifespan=lifespan,
    )
    internal = _AgentGuard(routes, tokens)
    operator = operator_app(health=health, metrics=metrics, rate_limit_headroom=rate_limit_headroom)
    return GatewayApp(
        model, internal, TranscriptAppendRoute(tokens, archives, bodies.budget, internal), operator, metrics, tracing
    )


async def check_at_start(settings: GatewaySettings) -> None:
    """Check the resources that the settings name before serving: state folder, prices, blob store, store, key ring.

    Raises SettingError or SealingError, which name the variable.
    """
    make_state_dir(settings.state_dir)
    PriceList.load(settings.model_prices)
    await Blobs(settings.blob_url, settings.state_dir / "blobs").require()
    await require_store(settings.store_url)
    await require_key_ring(settings.store_url, settings.key_path)


async def run(settings: GatewaySettings) -> None:
    """Serve until SIGTERM. Raises AddressError if an address cannot be used."""
    configure_logging("gateway", level=settings.log_level, format=settings.log_format)
    host, port = parse_address(settings.gateway_addr, "GATEWAY_ADDR")
    listener = bind(host, port, "GATEWAY_ADDR")
    _log.info("gateway.listening", address=settings.gateway_addr, claude_api=settings.claude_api_url)
    for warning in unused_proxies(os.environ):
        _log.warning("settings.warning", message=warning)
    try:
        await check_at_start(settings)
        app = create_app(settings)
    except BaseException:
        listener.close()
        raise
    tasks = Tasks("gateway-operator")
    if settings.gateway_operator_addr is not None:
        address = parse_address(settings.gateway_operator_addr, "GATEWAY_OPERATOR_ADDR")
        tasks.start("serve", serve_beside(app.operator, bind(*address, "GATEWAY_OPERATOR_ADDR")))
    try:
        await serve(app, listener)
    finally:
        await tasks.close()
