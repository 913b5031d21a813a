"""Reconciles agents: moves each from its observed state toward its desired state. Level-triggered, run by the leader.

Each step starts from the agent's current row and sandbox; nothing is kept in memory that a successor could not observe.
A step never waits for an agent to start: it returns when to take the next one. A leader that dies therefore leaves only
states from which the next leader continues: it adopts a running sandbox, repeats an unfinished start with a new secret,
stops a sandbox without a live row, and fails a row without a sandbox.

A missing response is not evidence: while the backend cannot list or inspect, no agent is failed or stopped.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.errors import AgentUnreachable, DeadlineExceeded, HypercoreError, Unavailable
from hypercore_agents.compute.base import ComputeBackend, SandboxError, SandboxRequest, SandboxState
from hypercore_agents.manager.fleet import failures, lifecycle
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.health import AgentHealth, Loss, heartbeat_seconds
from hypercore_agents.manager.fleet.leadership import LeadershipLost
from hypercore_agents.manager.fleet.rows import AgentRows
from hypercore_agents.manager.fleet.tools import configuration
from hypercore_agents.observability.metrics import ManagerMetrics
from hypercore_agents.security.bearers import new_bearer
from hypercore_agents.store import agents, turns
from hypercore_agents.store.agents import LIVE_STATES, WANTED_STOPPED, AgentRow
from hypercore_agents.store.database import Database

_log = structlog.get_logger(__name__)

READY_PAUSE = 0.05
SLOT_PAUSE = 0.1
TURNS_PAUSE = 0.25
START_TRIES = 2
_CALL_SLACK = 30.0


@dataclass(frozen=True)
class FleetRules:
    """How agents are started, watched and stopped. Times in seconds."""

    gateway_url: str
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout: float = 60.0
    enrolment_seconds: float = 120.0
    stop_grace: float = 10.0
    drain_timeout: float = 60.0
    health_interval: float = 30.0
    starts_at_once: int = 8
    allow_unisolated_tools: bool = False


@dataclass(frozen=True)
class Survey:
    """Result of a comparison of rows and sandboxes, by agent id.

    `lost`: running according to the row but not to the backend. `unfinished`: starting, draining, or without a live
    row.
    """

    lost: list[str]
    unfinished: list[str]
    running: list[str]


class Reconciler:
    """Takes steps for agents. Call `step` for the same agent from one task at a time only."""

    def __init__(
        self,
        *,
        database: Database,
        rows: AgentRows,
        backend: ComputeBackend,
        client: AgentClient,
        health: AgentHealth,
        rules: FleetRules,
        metrics: ManagerMetrics,
        clock: Callable[[], float],
        on_ended: Callable[[AgentRow], None],
    ) -> None:
        self._database = database
        self._rows = rows
        self._backend = backend
        self._client = client
        self._health = health
        self._rules = rules
        self._metrics = metrics
        self._clock = clock
        self._on_ended = on_ended
        self._starting: dict[str, float] = {}
        self._sandbox_started: dict[str, float] = {}
        self._draining: dict[str, float] = {}
        self._inherited: set[str] = set()

    async def step(self, agent_id: str) -> float | None:
        """Take an agent's next step; return the seconds until the following one, or None if there is none.

        Raises SandboxError when the backend fails: the caller retries with backoff.
        """
        try:
            row = await self._rows.get(agent_id)
            if row is None or row.state in lifecycle.ENDED:
                await self._reap(agent_id)
                return None
            if row.wanted == WANTED_STOPPED and row.state is not AgentState.DRAINING:
                moved = await self._rows.move(row, AgentState.DRAINING)
                if moved is None:
                    return 0.0
                row = moved
            steps = {
                AgentState.PENDING: self._launch,
                AgentState.STARTING: self._check_start,
                AgentState.RUNNING: self._check_running,
                AgentState.DRAINING: self._drain,
            }
            return await steps[row.state](row)
        except LeadershipLost:
            return None

    def forget(self) -> None:
        """Discard the state in memory: another process reconciles now."""
        self._starting.clear()
        self._sandbox_started.clear()
        self._draining.clear()
        self._inherited.clear()
        self._health.forget()

    async def survey(self) -> Survey:
        """Compare all live rows with all sandboxes. Raises SandboxError or TimeoutError if the backend does not
        respond."""
        async with asyncio.timeout(_CALL_SLACK):
            observed = {sandbox.agent_id: sandbox.state for sandbox in await self._backend.list()}
        async with self._database.read() as connection:
            rows = {row.agent_id: row for row in await agents.list_agents(connection, states=LIVE_STATES)}
        running = {agent_id for agent_id, row in rows.items() if row.state is AgentState.RUNNING}
        return Survey(
            lost=[agent_id for agent_id in running if observed.get(agent_id) is not SandboxState.RUNNING],
            unfinished=[agent_id for agent_id in {*rows, *observed} if agent_id not in running],
            running=list(running),
        )

    async def _launch(self, row: AgentRow) -> float | None:
        if row.agent_id not in self._starting and len(self._starting) >= self._rules.starts_at_once:
            return SLOT_PAUSE
        secret = new_bearer()
        config = configuration(
            row.kind, row.capacity, self._backend.capabilities, allow_unisolated=self._rules.allow_unisolated_tools
        )
        config = config.model_copy(update={"heartbeat_seconds": heartbeat_seconds(self._rules.health_interval)})
        begun = await self._rows.begin_start(row, secret, config, seconds=self._rules.enrolment_seconds)
        if begun is None:
            return 0.0
        now = self._starting[row.agent_id] = self._clock()
        self._phase("wait", now - row.created_at)
        try:
            async with asyncio.timeout(self._rules.start_timeout):
                sandbox = await self._backend.start(self._request(begun, secret))
        except HypercoreError as error:
            return await self._start_failed(begun, error)
        except TimeoutError:
            seconds = self._rules.start_timeout
            return await self._start_failed(begun, SandboxError(f"the sandbox did not start within {seconds:.0f} s"))
        except Exception:
            _log.exception("agent.start_defect", agent_id=row.agent_id)
            return await self._start_failed(begun, SandboxError("the backend failed to start the sandbox"))
        self._sandbox_started[row.agent_id] = started = self._clock()
        self._phase("sandbox", started - now)
        _log.info("agent.started", agent_id=row.agent_id, attempt=begun.attempts)
        return READY_PAUSE if await self._rows.set_address(begun, sandbox.address) else 0.0

    async def _start_failed(self, row: AgentRow, error: HypercoreError) -> float | None:
        again = isinstance(error, SandboxError) and row.kind is AgentKind.DEDICATED and row.attempts < START_TRIES
        if not again:
            return await self._fail(row, error)
        _log.warning("agent.start_again", agent_id=row.agent_id, error=error.message)
        await self._stop_sandbox(row.agent_id)
        return 0.0

    async def _check_start(self, row: AgentRow) -> float | None:
        if row.agent_id not in self._starting:
            self._inherited.add(row.agent_id)
        since = self._starting.setdefault(row.agent_id, self._clock())
        sandbox = await self._backend.inspect(row.agent_id)
        if sandbox is None:
            if row.attempts < START_TRIES:
                return await self._launch(row)
            return await self._fail(row, AgentUnreachable("the sandbox vanished while it started"))
        if sandbox.state is SandboxState.EXITED:
            await self._log_output(row.agent_id)
            status = "" if sandbox.exit_status is None else f" with status {sandbox.exit_status}"
            return await self._start_again(row, AgentUnreachable(f"the agent ended{status} before it was ready"))
        if row.bearer_sealed is not None and await self._client.is_ready(sandbox.address):
            return await self._now_running(row, sandbox.address)
        if self._clock() - since > self._rules.start_timeout:
            await self._log_output(row.agent_id)
            what = "did not become ready" if row.bearer_sealed is not None else "did not enrol with the gateway"
            seconds = self._rules.start_timeout
            return await self._start_again(row, DeadlineExceeded(f"the agent {what} within {seconds:.0f} s"))
        return READY_PAUSE

    async def _start_again(self, row: AgentRow, error: HypercoreError) -> float | None:
        """Fail a start, unless a previous leader began it: then the agent may never have received its secret, and is
        started again."""
        if row.agent_id not in self._inherited or row.kind is not AgentKind.DEDICATED or row.attempts >= START_TRIES:
            return await self._fail(row, error)
        _log.warning("agent.start_again", agent_id=row.agent_id, error=error.message)
        self._inherited.discard(row.agent_id)
        await self._stop_sandbox(row.agent_id)
        return await self._launch(row)

    async def _now_running(self, row: AgentRow, address: str) -> float | None:
        now = self._clock()
        if await self._rows.move(row, AgentState.RUNNING, running_at=now, address=address) is None:
            return 0.0
        self._starting.pop(row.agent_id, None)
        self._inherited.discard(row.agent_id)
        if (since := self._sandbox_started.pop(row.agent_id, None)) is not None:
            self._phase("enrol", now - since)
        self._metrics.spawns.labels("success").inc()
        self._metrics.spawn_seconds.observe(max(0.0, now - row.created_at))
        _log.info("agent.running", agent_id=row.agent_id, seconds=round(now - row.created_at, 3))
        return self._rules.health_interval

    async def _check_running(self, row: AgentRow) -> float | None:
        sandbox = await self._backend.inspect(row.agent_id)
        if sandbox is None:
            loss: Loss | None = Loss("gone", AgentUnreachable("the agent's sandbox is gone"))
        elif sandbox.state is SandboxState.EXITED:
            await self._log_output(row.agent_id)
            status = "" if sandbox.exit_status is None else f" with status {sandbox.exit_status}"
            loss = Loss("exited", AgentUnreachable(f"the agent ended{status}"))
        else:
            loss = await self._health.loss_of(row, sandbox.address)
        if loss is None:
            return self._rules.health_interval
        self._metrics.lost.labels(loss.reason).inc()
        return await self._fail(row, loss.error)

    async def _fail(self, row: AgentRow, error: HypercoreError) -> float | None:
        _log.warning("agent.failing", agent_id=row.agent_id, state=row.state.value, error=error.message)
        moved = await self._rows.move(row, AgentState.DRAINING, error=failures.describe(error))
        return 0.0 if moved is None else await self._drain(moved)

    async def _drain(self, row: AgentRow) -> float | None:
        self._starting.pop(row.agent_id, None)
        self._inherited.discard(row.agent_id)
        self._sandbox_started.pop(row.agent_id, None)
        since = self._draining.setdefault(row.agent_id, self._clock())
        if _turns_may_finish(row) and self._clock() - since < self._rules.drain_timeout:
            async with self._database.read() as connection:
                if await turns.count_turns(connection, row.agent_id, now=self._clock()):
                    return TURNS_PAUSE
        # Sessions stay placed until the sandbox is gone: the gateway accepts their last files and events only from the
        # agent that holds them. A turn that begins meanwhile moves its session, because the agent is not running.
        await self._stop_sandbox(row.agent_id)
        failed = row.error is not None and row.wanted != WANTED_STOPPED
        ended = await self._rows.end(row, AgentState.FAILED if failed else AgentState.STOPPED)
        if ended is None:
            return 0.0
        self._draining.pop(row.agent_id, None)
        if failed and row.running_at is None:
            self._metrics.spawns.labels("failure").inc()
        _log.info("agent.ended", agent_id=row.agent_id, state=ended.state.value, error=ended.error)
        self._on_ended(ended)
        return None

    def _phase(self, phase: str, seconds: float) -> None:
        self._metrics.spawn_phase_seconds.labels(phase).observe(max(0.0, seconds))

    async def _reap(self, agent_id: str) -> None:
        if await self._backend.inspect(agent_id) is not None:
            _log.warning("agent.orphan_removed", agent_id=agent_id)
            await self._stop_sandbox(agent_id)

    async def _stop_sandbox(self, agent_id: str) -> None:
        grace = self._rules.stop_grace
        try:
            async with asyncio.timeout(grace + _CALL_SLACK):
                await self._backend.stop(agent_id, grace=grace)
                left = await self._backend.inspect(agent_id)
        except TimeoutError:
            raise SandboxError(f"the sandbox of {agent_id} did not stop in time") from None
        if left is not None and left.state is SandboxState.RUNNING:
            raise SandboxError(f"the sandbox of {agent_id} is still running after it was stopped")

    async def _log_output(self, agent_id: str) -> None:
        output = await self._backend.logs(agent_id, limit=2000)
        _log.warning("agent.output", agent_id=agent_id, output=output.decode(errors="replace"))

    def _request(self, row: AgentRow, secret: str) -> SandboxRequest:
        return SandboxRequest(
            agent_id=row.agent_id,
            cores=row.cores,
            memory_mb=row.memory_mb,
            gateway_url=self._rules.gateway_url,
            enrolment_secret=secret,
            gpu_quota_mb=row.gpu_quota_mb,
            image=row.image,
            environment={
                **self._rules.environment,
                "MAX_CONCURRENT_REQUESTS": str(row.capacity),
                "AGENT_MEMORY_MB": str(row.memory_mb),
                "AGENT_CORES": str(row.cores),
                # All sessions of a dedicated agent belong to its owner.
                **({"USER_SHARE": "1"} if row.kind is AgentKind.DEDICATED else {}),
            },
        )


def _turns_may_finish(row: AgentRow) -> bool:
    """Return whether a draining agent's running turns may finish: not if a user deleted it, or if it is dead."""
    if row.error is not None:
        return row.running_at is not None and row.error.startswith(f"{Unavailable.type}: ")
    return row.kind is AgentKind.POOL
