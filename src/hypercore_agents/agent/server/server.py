"""The agent server: builds its parts and runs them from enrolment to shutdown (enrolling → serving → draining).

The server responds from the start: `/health` at once, `/ready` with 503 and the reason until it is enrolled. All
other routes need the manager's bearer, which the enrolment provides.
"""

import asyncio
import functools
import os
import time
from collections.abc import Callable
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry

from hypercore_agents.agent.claude.approvals import Approvals
from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.environment import hide_memory
from hypercore_agents.agent.claude.options import bundled_cli, why_no_tools
from hypercore_agents.agent.claude.readiness import StartReadiness
from hypercore_agents.agent.claude.start import trial_start
from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.agent.gateway.enrolment import EnrolmentFailed, enrol
from hypercore_agents.agent.isolation.backends import build_isolation
from hypercore_agents.agent.isolation.files import WorkspaceFiles
from hypercore_agents.agent.launcher.client import LauncherClient
from hypercore_agents.agent.scheduling.start_limiter import StartLimiter
from hypercore_agents.agent.server.heartbeat import HeartbeatLoop
from hypercore_agents.agent.sessions.parking import ParkingLimits
from hypercore_agents.agent.sessions.registry import Sessions
from hypercore_agents.agent.settings import AgentSettings
from hypercore_agents.api.errors import Unauthenticated, Unavailable
from hypercore_agents.api.internal import AgentToken, EnrolmentGrant
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.observability.metrics import AgentMetrics, render
from hypercore_agents.observability.tracing import FLUSH_SECONDS, open_tracing
from hypercore_agents.security import bearers

_log = structlog.get_logger(__name__)
_ENROLLING = "the agent is enrolling"


class AgentServer:
    """One agent. Created in the composition root; call `start` in the running loop and `close` after serving."""

    def __init__(
        self,
        settings: AgentSettings,
        launcher: LauncherClient | None = None,
        *,
        on_serving: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.launcher = launcher
        self.tools_off: str | None = _ENROLLING
        self._on_serving = on_serving
        self.metrics = AgentMetrics(CollectorRegistry())
        # share 0: a trace begins at the front door, which has decided whether it is recorded
        self.tracing = open_tracing("agent", on=settings.tracing, share=0)
        self.state: Literal["enrolling", "serving", "draining", "failed"] = "enrolling"
        self.failed = asyncio.Event()
        self.failure: EnrolmentFailed | None = None
        self.process_id = os.getpid()
        self._tasks = Tasks("agent")
        self._bearer: str | None = None
        self.readiness = StartReadiness()
        self._sessions: Sessions | None = None
        self._files: WorkspaceFiles | None = None
        self._gateway: GatewayClient | None = None

    def start(self) -> None:
        """Begin to enrol; serving follows. If enrolment fails, `failed` is set and `failure` has the reason."""
        self._tasks.start("enrol", self._enrol())

    def authenticate(self, authorization: str | None) -> None:
        """Check the manager's bearer. Raises Unavailable before enrolment, and Unauthenticated for a wrong bearer."""
        if self._bearer is None:
            raise Unavailable(_ENROLLING, retry_after=1)
        if not bearers.matches(bearers.presented(authorization), self._bearer):
            raise Unauthenticated("an agent accepts requests only from its manager; send requests there")

    def enrolled(self) -> Sessions:
        """Return the sessions. Raises Unavailable before enrolment."""
        if self._sessions is None:
            raise Unavailable(_ENROLLING, retry_after=1)
        return self._sessions

    def files(self) -> WorkspaceFiles:
        """Return the file operations of sessions. Raises Unavailable before enrolment."""
        if self._files is None:
            raise Unavailable(_ENROLLING, retry_after=1)
        return self._files

    def serving(self, *, new: bool = False) -> Sessions:
        """Return the sessions for a turn; `new`: it is the first turn of its session.

        Raises Unavailable while this agent accepts no turns.
        """
        reason = self.not_ready()
        if reason is not None:
            error = Unavailable(reason)
            # A session that was here before may have state that only this agent has.
            raise error.for_another_agent() if new and reason == self.readiness.reason else error
        return self.enrolled()

    def not_ready(self) -> str | None:
        """Return why this agent accepts no turns, None when it does."""
        if self.state != "serving":
            return f"the agent is {self.state}"
        refused = self._gateway.refused if self._gateway is not None else None
        return refused or self.readiness.reason

    def render_metrics(self) -> bytes:
        """Return the metrics in the Prometheus text format, with current gauges."""
        if self._sessions is not None:
            placed, live, running = self._sessions.counts()
            self.metrics.active_sessions.set(placed)
            self.metrics.live_sessions.set(live)
            self.metrics.running_turns.set(running)
            self.metrics.waiting_turns.set(self._sessions.capacity.waiting)
            self.metrics.parked_sessions.set(placed - live)
            self.metrics.cli_memory.set(self._sessions.memory_mb() * 2**20)
        return render(self.metrics.registry)

    async def drain(self) -> None:
        """Accept no new turns and wait for the running ones; those that do not end in time are interrupted."""
        if self.state == "failed":
            return
        _log.info("agent.draining", grace_seconds=self.settings.drain_grace)
        self.state = "draining"
        if self._sessions is not None:
            await self._sessions.drain(self.settings.drain_grace)

    async def close(self) -> None:
        """End everything; afterwards no process of any session runs."""
        if self.state != "failed":
            self.state = "draining"
        if self._sessions is not None:
            await self._sessions.close()
        await self._tasks.close()
        await self._send_spans()
        if self._gateway is not None:
            await self._gateway.close()
        if self.launcher is not None:
            self.launcher.close()

    async def _send_spans(self) -> None:
        if self.tracing is not None and self._gateway is not None:
            await self.tracing.flush(self._gateway.send_spans)

    async def _enrol(self) -> None:
        settings = self.settings
        started = time.perf_counter()
        try:
            grant = await enrol(
                settings.agent_id, settings.gateway_url, settings.enrolment_fd, timeout=settings.enrolment_timeout
            )
        except EnrolmentFailed as error:
            self.state = "failed"
            self.failure = error
            self.failed.set()
            return
        self._serve(grant)
        _log.info("agent.enrolled", duration_ms=round((time.perf_counter() - started) * 1000))

    def _serve(self, grant: EnrolmentGrant) -> None:
        """Build the parts that need the grant, and accept turns."""
        settings = self.settings
        if grant.configuration.tools:
            hide_memory()
        self._gateway = GatewayClient(
            settings.gateway_url, AgentToken(agent_token=grant.agent_token, expires_at=grant.expires_at)
        )
        self._gateway.start(self._tasks)
        live_limit = min(settings.live_limit(), grant.configuration.max_concurrent)
        context = self._context(grant, self._gateway, live_limit)
        if grant.configuration.sessions_move:
            self.readiness.enable_trials(functools.partial(trial_start, context), context.tasks)
        self.tools_off = why_no_tools(grant.configuration, separate=context.isolation.separate)
        self._files = WorkspaceFiles(context.isolation)
        self._sessions = Sessions(
            context,
            self._gateway,
            self.metrics,
            live_limit=live_limit,
            # Only a CLI whose credential is added outside of it can be started before its session is known.
            prewarmed=settings.prewarmed_target(live_limit) if context.isolation.separate else 0,
            parking_limits=ParkingLimits(
                settings.park_after, settings.live_memory_mb(), settings.recycle_mb, settings.background_max
            ),
            live_limit_of_user=settings.live_limit_of_user(),
            capacity_timeout=settings.room_timeout,
            interrupt_grace=settings.interrupt_grace,
            tracing=self.tracing,
            log_content=settings.log_content,
        )
        if self.tracing is not None:
            self._tasks.repeat("traces", self._send_spans, every=FLUSH_SECONDS)
        self._bearer = grant.bearer
        if self.state == "enrolling":
            self.state = "serving"
            self._on_serving()
        heartbeat = HeartbeatLoop(
            self._gateway, self._sessions, self.metrics, settings.memory_mb(), settings.cores(), self.not_ready
        )

        def beat_now() -> None:
            self._tasks.start("heartbeat-now", heartbeat.beat())

        self.readiness.on_change = beat_now
        self._tasks.repeat("heartbeat", heartbeat.beat, every=grant.configuration.heartbeat_seconds)

    def _context(self, grant: EnrolmentGrant, gateway: GatewayClient, live_limit: int) -> AgentContext:
        settings = self.settings
        return AgentContext(
            agent_id=settings.agent_id,
            isolation=build_isolation(
                settings.agent_state_dir, settings.gateway_url, self.launcher, self._tasks, settings.user_share
            ),
            cli=settings.claude_cli_path or bundled_cli(),
            skills=settings.skills_dir,
            configuration=grant.configuration,
            start_timeout=settings.cli_start_timeout,
            approvals=Approvals(limit=max(1, live_limit // 4), deadline=settings.approval_timeout),
            start_limiter=StartLimiter(
                max(1, len(os.sched_getaffinity(0))), gateway, on_wait=self.metrics.start_wait_seconds.observe
            ),
            metrics=self.metrics,
            gateway=gateway,
            tasks=Tasks("sessions"),
            workspace_bytes=settings.workspace_max_mb * 2**20,
            workspace_files=settings.workspace_max_files,
            readiness=self.readiness,
        )
