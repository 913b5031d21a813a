"""Composition root of one manager process: creates its parts, starts and stops them."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from hypercore_agents.api.errors import HypercoreError, Unavailable
from hypercore_agents.compute.base import ComputeBackend
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.relay.relay import Relay, RequestLimits
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.agents import AgentDefaults, Agents
from hypercore_agents.manager.fleet.directory import AgentDirectory
from hypercore_agents.manager.fleet.health import AgentHealth
from hypercore_agents.manager.fleet.leadership import LEASE_SECONDS, Leadership
from hypercore_agents.manager.fleet.loop import SWEEP_SECONDS, FleetLoop
from hypercore_agents.manager.fleet.pool import Pool
from hypercore_agents.manager.fleet.reconciler import Reconciler
from hypercore_agents.manager.fleet.rows import AgentRows
from hypercore_agents.manager.fleet_settings import agent_urls, fleet_rules, pool_shape
from hypercore_agents.manager.http.auth import Authenticator
from hypercore_agents.manager.http.gauges import StoreGauges
from hypercore_agents.manager.http.health import INTERVAL_SECONDS as HEALTH_SECONDS
from hypercore_agents.manager.http.health import Dependency, HealthChecks
from hypercore_agents.manager.idempotency import Idempotency
from hypercore_agents.manager.identity import RENEW_SECONDS, ManagerIdentity
from hypercore_agents.manager.open_responses import OpenResponses
from hypercore_agents.manager.rate_limits import RateLimits
from hypercore_agents.manager.retention import INTERVAL_SECONDS as RETENTION_SECONDS
from hypercore_agents.manager.retention import Retention, RetentionPeriods
from hypercore_agents.manager.sessions.follow import EventStreams
from hypercore_agents.manager.sessions.idle_release import INTERVAL_SECONDS as IDLE_SECONDS
from hypercore_agents.manager.sessions.idle_release import IdleSessions
from hypercore_agents.manager.sessions.missed_heartbeats import MissedHeartbeats
from hypercore_agents.manager.sessions.opening import SessionOpener
from hypercore_agents.manager.sessions.placement import OptionDefaults, Placements, UserShares
from hypercore_agents.manager.sessions.purge import INTERVAL_SECONDS as PURGE_SECONDS
from hypercore_agents.manager.sessions.purge import Purge
from hypercore_agents.manager.sessions.reclaim import PlaceReclaimer
from hypercore_agents.manager.sessions.sessions import Sessions
from hypercore_agents.manager.sessions.turn_relay import TurnRelay
from hypercore_agents.manager.sessions.turns import TurnDefaults, Turns
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.observability.metrics import ManagerMetrics, render, render_shared
from hypercore_agents.observability.tracing import FLUSH_SECONDS, collector, open_tracing
from hypercore_agents.security.sealing import KeyRing, KeyRingFile, Sealer, SealingError, derive_key
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import check_key_ring
from hypercore_agents.store.schema import migrate

_log = structlog.get_logger(__name__)

BLOBS_SECONDS = 30.0
"""Pause between probes of the blob store, each of three requests. `/health` reports the last result."""
EXIT_SECONDS = 45.0
"""Maximum time to stop all agents when the manager ends (STOP_AGENTS_ON_EXIT)."""


@dataclass(frozen=True)
class SharedAddress:
    """What a worker needs to know about the other workers at its address (see `workers.py`).

    `ends_last` returns, when this worker ends, whether all others have ended. Only then may it stop agents: any other
    worker still running would take the lease and refill the pool.
    """

    metrics_folder: Path
    ends_last: Callable[[], bool]
    stop: asyncio.Event


class Manager:
    """The parts of one manager process. `shared` None: it serves its address alone."""

    def __init__(
        self,
        settings: ManagerSettings,
        backend: ComputeBackend,
        base_url: str,
        clock: Callable[[], float],
        shared: SharedAddress | None = None,
    ) -> None:
        self.settings = settings
        self.shared = shared
        self.backend = backend
        self.clock = clock
        self.metrics = ManagerMetrics(CollectorRegistry())
        self.database = Database(settings.store_url)
        KeyRing.load_or_create(settings.key_path)
        self.ring = KeyRingFile(settings.key_path)
        sealer = Sealer(self.ring)
        self.tasks = Tasks("manager")
        self.tracing = open_tracing("manager", on=settings.otlp_endpoint is not None, share=settings.trace_share)
        self.relay = Relay(limits=RequestLimits(connect=5.0))
        self.identity = ManagerIdentity(self.database, clock)
        self.changes = ChangeSignals()
        self.client = AgentClient(self.relay)
        self.directory = AgentDirectory(self.database, sealer)
        self.shape = pool_shape(settings, backend)
        leadership = Leadership(self.database, self.identity.manager_id, clock)
        pool = Pool(self.database, leadership, self.shape, clock)
        health = AgentHealth(
            self.database,
            self.client,
            lambda: self.client.is_ready(settings.sandbox_gateway_url),
            interval=settings.health_check_interval,
            clock=clock,
        )
        reconciler = Reconciler(
            database=self.database,
            rows=AgentRows(self.database, leadership, self.changes, clock),
            backend=backend,
            client=self.client,
            health=health,
            rules=fleet_rules(settings),
            metrics=self.metrics,
            clock=clock,
            on_ended=pool.ended,
        )
        self.leadership = leadership
        self.fleet = FleetLoop(
            database=self.database,
            leadership=leadership,
            reconciler=reconciler,
            pool=pool,
            health=health,
            sweep_seconds=min(SWEEP_SECONDS, settings.health_check_interval / 10),
            clock=clock,
            on_lag=self.metrics.reconcile_lag_seconds.observe,
        )
        limits = RateLimits(
            self.database,
            per_minute=settings.rate_limit_per_minute,
            per_hour=settings.rate_limit_per_hour,
            clock=clock,
        )
        self.idempotency = Idempotency(
            self.database,
            holder=self.identity.manager_id,
            secret=derive_key(KeyRing.load(settings.key_path), "idempotency"),
            clock=clock,
        )
        self.agents = Agents(
            database=self.database,
            backend=backend,
            sealer=sealer,
            changes=self.changes,
            wake=self.fleet.wake,
            defaults=AgentDefaults(
                capacity=settings.max_concurrent_requests,
                timeout_seconds=settings.request_timeout,
                agents_per_user=settings.max_agents_per_user,
                spawn_wait=2 * settings.start_timeout + 30,
                delete_wait=settings.stop_grace + 60,
                places_per_user=settings.places_per_user,
                sessions_per_user=settings.max_sessions_per_user,
                stored_bytes_per_user=settings.user_storage_mb << 20,
            ),
            limits=limits,
            pool=self.shape,
            allow_unisolated_tools=settings.allow_unisolated_tools,
            heard_within=settings.health_check_interval,
            url_of=agent_urls(settings, base_url),
            clock=clock,
        )
        self.blobs = Blobs(settings.blob_url, settings.state_dir / "blobs")
        self.purge = Purge(
            self.database,
            self.blobs,
            ttl=settings.session_ttl,
            leads=lambda: self.leadership.leads,
            clock=clock,
        )
        reclaimer = PlaceReclaimer(self.database, self.directory, self.client, clock=clock)
        placements = Placements(
            database=self.database,
            directory=self.directory,
            reclaimer=reclaimer,
            defaults=OptionDefaults(pool=settings.pool_config.options, platform=settings.platform_options()),
            shares=UserShares(settings.places_per_user, settings.max_sessions_per_user),
            clock=clock,
        )
        self.retention = Retention(
            self.database,
            RetentionPeriods(
                agents=settings.ended_agents_ttl, sessions=settings.ended_sessions_ttl, ledger=settings.ledger_ttl
            ),
            leads=lambda: self.leadership.leads,
            clock=clock,
        )
        self.idle = IdleSessions(
            self.database,
            reclaimer,
            ttl=settings.place_ttl,
            leads=lambda: self.leadership.leads,
            clock=clock,
        )
        self.sessions = Sessions(
            database=self.database, directory=self.directory, client=self.client, purge=self.purge, clock=clock
        )
        self.event_streams = EventStreams(
            database=self.database,
            directory=self.directory,
            upstream=self.relay,
            changes=self.changes,
            clock=clock,
        )
        self.open_streams = OpenResponses(
            "event_streams", "event streams", "MAX_EVENT_STREAMS_PER_USER", settings.max_event_streams_per_user
        )
        self.open_downloads = OpenResponses(
            "downloads", "downloads", "MAX_DOWNLOADS_PER_USER", settings.max_downloads_per_user
        )
        self.missed_heartbeats = MissedHeartbeats(self.database, interval=settings.health_check_interval, clock=clock)
        self.turns = Turns(
            database=self.database,
            directory=self.directory,
            placements=placements,
            changes=self.changes,
            limits=limits,
            defaults=TurnDefaults(settings.default_max_tokens, settings.default_temperature),
            holder=self.identity.manager_id,
            clock=clock,
        )
        self.turn_relay = TurnRelay(
            turns=self.turns,
            directory=self.directory,
            relay=self.relay,
            client=self.client,
            metrics=self.metrics,
            missed_heartbeats=self.missed_heartbeats,
            wake=self.fleet.wake,
            tasks=self.tasks,
        )
        self.session_opener = SessionOpener(
            database=self.database,
            directory=self.directory,
            placements=placements,
            client=self.client,
            wake=self.fleet.wake,
            clock=clock,
        )
        self.gauges = StoreGauges(
            self.database,
            self.metrics,
            self.shape,
            state_dir=settings.state_dir,
            key_file=settings.key_path,
            clock=clock,
            host=self.backend.usage,
        )
        self._blobs_failure: Unavailable | None = None
        self.health_checks = self._health_checks()
        secret = settings.jwt_secret if settings.enable_auth else None
        self.authenticator = Authenticator(
            self.database, secret.get_secret_value() if secret is not None else None, clock
        )

    async def start(self) -> None:
        """Migrate the store, take this process's lease, and start all loops."""
        await migrate(self.database)
        await self.identity.renew()
        if self.tracing is not None:
            self.tasks.repeat("traces", self._send_spans, every=FLUSH_SECONDS)
        self.tasks.repeat("identity", self.identity.renew, every=RENEW_SECONDS)
        self.tasks.repeat("idempotency", self.idempotency.forget_old, every=600)
        self.tasks.repeat("idle", self.idle.run_once, every=min(IDLE_SECONDS, (self.settings.place_ttl or 600) / 4))
        self.tasks.repeat("retention", self.retention.run_once, every=RETENTION_SECONDS)
        self.tasks.repeat("purge", self.purge.run_once, every=PURGE_SECONDS)
        self.tasks.repeat("blobs", self._probe_blobs, every=BLOBS_SECONDS)
        self.tasks.repeat("silence", self.missed_heartbeats.run_once, every=self.missed_heartbeats.interval_seconds)
        self.tasks.repeat("health", self.health_checks.run, every=HEALTH_SECONDS)
        self.fleet.start()
        _log.info("manager.started", manager_id=self.identity.manager_id, backend=self.backend.name)

    async def stop(self) -> None:
        """Stop the agents if configured, then all parts of this process. Otherwise sandboxes keep running."""
        try:
            if self.settings.stop_agents_on_exit and (self.shared is None or self.shared.ends_last()):
                await self._stop_agents()
        except (HypercoreError, TimeoutError):
            _log.exception("manager.agents_not_stopped")
        await self.fleet.close()
        await self.tasks.close()
        await self._send_spans()
        with contextlib.suppress(Unavailable):
            await self.identity.release()
        await self.relay.close()
        await self.backend.close()
        await self.database.close()

    async def _send_spans(self) -> None:
        if self.tracing is not None and self.settings.otlp_endpoint is not None:
            await self.tracing.flush(collector(self.relay, self.settings.otlp_endpoint))

    async def _stop_agents(self) -> None:
        async with asyncio.timeout(EXIT_SECONDS):
            await self._wait_for_lead()
            if not self.leadership.leads:
                return  # another manager leads
            await self.fleet.stop_everything()
            while (await self.agents.stats()).total_agents:  # noqa: ASYNC110  the store has to be polled
                await asyncio.sleep(0.05)
        _log.info("manager.agents_stopped")

    async def _wait_for_lead(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEASE_SECONDS + 1):
                while not self.leadership.leads:  # noqa: ASYNC110  the other process's lease has to expire
                    await asyncio.sleep(0.1)

    def metrics_page(self) -> bytes:
        """Return the metrics of this process, or of all processes that share its address."""
        return render(self.metrics.registry) if self.shared is None else render_shared(self.shared.metrics_folder)

    def _health_checks(self) -> HealthChecks:
        """Return the checks of this manager's dependencies."""
        dependencies = [
            Dependency("store", self.database.check_writes, seconds=5.0),
            Dependency("key_ring", self._check_key_ring),
            Dependency(
                "gateway", lambda: self._check_http("the gateway", f"{self.settings.sandbox_gateway_url}/ready")
            ),
            Dependency("backend", self.backend.list),
            Dependency("blobs", self._check_blobs, required=False),
        ]
        if self.settings.prometheus_is_configured:
            url = f"{self.settings.prometheus_url}/-/ready"
            dependencies.append(Dependency("prometheus", lambda: self._check_http("Prometheus", url), required=False))
        shown = self.metrics.dependency_up
        return HealthChecks(
            dependencies,
            lambda name, ok: shown.labels(name).set(ok) if name in self.metrics.DEPENDENCIES else None,
        )

    async def _probe_blobs(self) -> None:
        try:
            await self.blobs.check()
        except Unavailable as error:
            self._blobs_failure = error
        else:
            self._blobs_failure = None

    async def _check_blobs(self) -> None:
        if self._blobs_failure is not None:
            raise self._blobs_failure

    async def _check_key_ring(self) -> None:
        try:
            await check_key_ring(self.database, self.ring())
        except SealingError as error:
            raise Unavailable(str(error)) from None

    async def _check_http(self, name: str, url: str) -> None:
        try:
            response = await self.relay.open("GET", url, limits=RequestLimits(connect=2, response=2, idle=2))
        except HypercoreError:
            raise Unavailable(f"{name} cannot be reached") from None
        response.close()
        if response.status != 200:
            raise Unavailable(f"{name} responds with status {response.status}")
