"""The leader's loop: renews the lease, finds agents that need a step, and runs one worker per agent.

Every process runs the loop; without the lease it only tries to take it. A change in this process wakes the loop at once
(`wake`); a change by another process is found within `TICK_SECONDS`, by one indexed query.
"""

import asyncio
from collections.abc import Callable

import structlog

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.compute.base import SandboxError
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.aio.workqueue import WorkQueue
from hypercore_agents.manager.fleet.health import AgentHealth
from hypercore_agents.manager.fleet.leadership import RENEW_SECONDS, Leadership, LeadershipLost
from hypercore_agents.manager.fleet.pool import Pool
from hypercore_agents.manager.fleet.reconciler import Reconciler
from hypercore_agents.store import agents
from hypercore_agents.store.database import Database

_log = structlog.get_logger(__name__)

TICK_SECONDS = 0.25
ELECTION_SECONDS = 1.0
SWEEP_SECONDS = 2.0
WORKERS = 32


class FleetLoop:
    """Runs the election, sweeps and the work queue. `clock` returns Unix seconds and also paces the loop."""

    def __init__(
        self,
        *,
        database: Database,
        leadership: Leadership,
        reconciler: Reconciler,
        pool: Pool,
        health: AgentHealth,
        sweep_seconds: float = SWEEP_SECONDS,
        clock: Callable[[], float],
        on_lag: Callable[[float], None],
    ) -> None:
        self._database = database
        self._leadership = leadership
        self._reconciler = reconciler
        self._pool = pool
        self._health = health
        self._sweep_seconds = sweep_seconds
        self._clock = clock
        self._queue = WorkQueue("reconciler", self._handle, workers=WORKERS, on_lag=on_lag)
        self._tasks = Tasks("fleet")
        self._next_election = 0.0
        self._next_sweep = 0.0
        self._unswept = True
        self._sweeping: asyncio.Task[None] | None = None
        self._replaces_agents = True

    def start(self) -> None:
        """Start the loop."""
        self._queue.start()
        self._tasks.repeat("lead", self.tick, every=TICK_SECONDS)

    def wake(self, agent_id: str) -> None:
        """Queue the agent's next step, if this process leads."""
        if self._leadership.leads:
            self._queue.add(agent_id)

    def rebalance(self) -> None:
        """Adjust the pool's size at the next tick rather than at the next sweep, if this process leads."""
        self._next_sweep = 0.0

    async def tick(self) -> None:
        """Do what is due now: renew the lease, sweep, queue agents that need a step."""
        try:
            if await self._elected():
                await self._queue_due_steps()
        except LeadershipLost:
            self._reconciler.forget()
        except Unavailable:
            _log.warning("fleet.store_unavailable")

    async def stop_everything(self) -> None:
        """Request every agent's stop, and stop replacing agents of the pool. Only the leader can do this."""
        self._replaces_agents = False
        now = self._clock()
        async with self._database.write() as connection:
            await self._leadership.guard(connection)
            live = await agents.list_agents(connection)
            for row in live:
                await agents.want_stopped(connection, row.agent_id, now=now)
        for row in live:
            self._queue.add(row.agent_id)

    async def close(self) -> None:
        """Stop the loop and release the lease."""
        await self._tasks.close()
        await self._queue.close()
        await self._leadership.release()

    async def _elected(self) -> bool:
        now = self._clock()
        if now >= self._next_election:
            led = self._leadership.leads
            if await self._leadership.renew():
                self._unswept = True
                self._next_sweep = now
            elif led and not self._leadership.leads:
                self._reconciler.forget()
            self._next_election = now + (RENEW_SECONDS if self._leadership.leads else ELECTION_SECONDS)
        return self._leadership.leads

    async def _queue_due_steps(self) -> None:
        if self._clock() >= self._next_sweep:
            self._next_sweep = self._clock() + self._sweep_seconds
            await self._balance()
            for agent_id in await self._health.suspicious():
                self._queue.add(agent_id)
            if self._sweeping is None or self._sweeping.done():
                # A backend that hangs must not prevent the renewal of the lease.
                self._sweeping = self._tasks.start("sweep", self._sweep())
        async with self._database.read() as connection:
            due = await agents.needing_attention(connection)
        for agent_id in due:
            self._queue.add(agent_id)

    async def _sweep(self) -> None:
        try:
            survey = await self._reconciler.survey()
        except (SandboxError, TimeoutError):
            _log.warning("fleet.backend_silent")
            return
        # `add` cuts a pause short, `add_after` does not: an agent whose stop failed stays in its backoff.
        for agent_id in survey.lost:
            self._queue.add(agent_id)
        for agent_id in survey.unfinished:
            self._queue.add_after(agent_id, 0.0)
        if self._unswept:
            for agent_id in survey.running:
                self._queue.add_after(agent_id, 0.0)
            self._unswept = False

    async def _handle(self, agent_id: str) -> float | None:
        if not self._leadership.leads:
            return None
        pause = await self._reconciler.step(agent_id)
        if pause is None:
            await self._balance()
        return pause

    async def _balance(self) -> None:
        if not self._replaces_agents:
            return
        try:
            for agent_id in await self._pool.balance():
                self._queue.add(agent_id)
        except LeadershipLost:
            self._reconciler.forget()
