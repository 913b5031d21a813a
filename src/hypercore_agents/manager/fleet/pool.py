"""Keeps the pool at its wanted size: starts what is missing, a few at once; drains what is too many, emptiest first.

The wanted size is `pools.desired` once somebody has set it, before that `MIN_AGENTS`; it never leaves the
range from `MIN_AGENTS` to `MAX_AGENTS`. An agent that failed is replaced: the first time at once, then after a
growing pause, so that a broken image does not spin.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.manager.fleet.leadership import Leadership
from hypercore_agents.store import agents, pools
from hypercore_agents.store.agents import WANTED_RUNNING, AgentRow
from hypercore_agents.store.database import Connection, Database

_log = structlog.get_logger(__name__)

STEADY_SECONDS = 60.0
FIRST_PAUSE = 1.0
LAST_PAUSE = 60.0


@dataclass(frozen=True)
class PoolShape:
    """What every agent of the pool is like, and how many there may be. Memory in MB, timeout in seconds."""

    user_id: str
    backend: str
    cores: int
    memory_mb: int
    capacity: int
    timeout_seconds: int
    minimum: int
    maximum: int
    starts_at_once: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    def new_row(self, now: float) -> AgentRow:
        """Return the row of a fresh agent of the pool."""
        return AgentRow(
            agent_id=new_agent_id(),
            user_id=self.user_id,
            kind=AgentKind.POOL,
            state=AgentState.PENDING,
            wanted=WANTED_RUNNING,
            backend=self.backend,
            cores=self.cores,
            memory_mb=self.memory_mb,
            gpu_quota_mb=None,
            capacity=self.capacity,
            timeout_seconds=self.timeout_seconds,
            options=self.options,
            tags={},
            address=None,
            bearer_sealed=None,
            error=None,
            attempts=0,
            version=0,
            created_at=now,
            updated_at=now,
            running_at=None,
            ended_at=None,
        )

    def desired(self, pool: pools.PoolRow | None) -> int:
        """Return the size that the pool shall have."""
        return min(max(pool.desired if pool else self.minimum, self.minimum), self.maximum)


class Pool:
    """The leader's care for the pool. `clock` returns Unix seconds."""

    def __init__(
        self, database: Database, leadership: Leadership, shape: PoolShape, clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._leadership = leadership
        self._shape = shape
        self._clock = clock
        self._failures = 0
        self._not_before = 0.0

    def ended(self, row: AgentRow) -> None:
        """Take note that an agent of the pool is over; one that failed makes the next start wait."""
        if row.kind is not AgentKind.POOL or row.state is not AgentState.FAILED:
            return
        now = self._clock()
        was_steady = row.running_at is not None and now - row.running_at > STEADY_SECONDS
        self._failures = 1 if was_steady else self._failures + 1
        if self._failures > 1:
            pause = min(FIRST_PAUSE * 2 ** min(self._failures - 2, 30), LAST_PAUSE)
            self._not_before = now + pause
            _log.warning("pool.start_delayed", failures=self._failures, pause_seconds=pause)

    async def balance(self) -> list[str]:
        """Add or drain agents as the wanted size asks; return those that now need to be looked at.

        Raises LeadershipLost when this process does not lead.
        """
        async with self._database.read() as connection:
            missing, surplus = await self._difference(connection)
        if not missing and not surplus:
            return []
        async with self._database.write(exclusive="pool") as connection:
            await self._leadership.guard(connection)
            now = self._clock()
            missing, surplus = await self._difference(connection)
            added = [self._shape.new_row(now) for _ in range(missing)]
            for row in added:
                await agents.insert_agent(connection, row)
            for agent_id in surplus:
                await agents.want_stopped(connection, agent_id, now=now)
        if added or surplus:
            _log.info("pool.changed", started=len(added), drained=len(surplus))
        return [row.agent_id for row in added] + surplus

    async def _difference(self, connection: Connection) -> tuple[int, list[str]]:
        desired = self._shape.desired(await pools.get_pool(connection))
        rows = [
            row
            for row in await agents.list_agents(connection, kind=AgentKind.POOL)
            if row.state is not AgentState.DRAINING and row.wanted == WANTED_RUNNING
        ]
        if len(rows) <= desired:
            starting = sum(row.state is not AgentState.RUNNING for row in rows)
            allowed = 0 if self._clock() < self._not_before else self._shape.starts_at_once - starting
            return max(0, min(desired - len(rows), allowed)), []
        placed = await agents.sessions_per_agent(connection, [row.agent_id for row in rows])
        emptiest = sorted(
            rows,
            key=lambda row: (row.state is AgentState.RUNNING, placed.get(row.agent_id, 0), -row.created_at),
        )
        return 0, [row.agent_id for row in emptiest[: len(rows) - desired]]
