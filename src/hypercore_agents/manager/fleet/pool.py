"""Keeps the pool at its desired size and revision: starts and drains agents as `rolling.next_step` decides.

The desired size is `pools.desired` if it has been set, otherwise `MIN_AGENTS`; it is always limited to the range from
`MIN_AGENTS` to `MAX_AGENTS`. A failed agent is replaced: the first time at once, then after a growing pause, so that a
broken image does not cause a busy loop. The pause stays short if the agent had been running: its image works, and it
may have been the pool's last agent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.api.pool import PoolConfig, RollStatus
from hypercore_agents.manager.fleet import rolling as rolling_pool
from hypercore_agents.manager.fleet.leadership import Leadership
from hypercore_agents.manager.fleet.rolling import Step
from hypercore_agents.store import agents, pools, rolls
from hypercore_agents.store.agents import WANTED_RUNNING, AgentRow
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.rolls import RollRow

_log = structlog.get_logger(__name__)

STEADY_SECONDS = 60.0
FIRST_PAUSE = 1.0
LAST_PAUSE = 60.0
PAUSE_AFTER_RUNNING = 5.0


@dataclass(frozen=True)
class PoolShape:
    """Properties of the pool's agents, and the limits of its size. Memory in MB, timeout in seconds."""

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
    image: str | None = None
    revision: int = 0

    def of_roll(self, roll: RollRow | None) -> "PoolShape":
        """Return the shape for an agent that starts now: that of the roll, or the previous one if the roll stopped."""
        if roll is None:
            return self
        stopped = roll.status is RollStatus.STOPPED
        revision = roll.before_revision if stopped else roll.revision
        template = roll.before_template if stopped else roll.template
        shape = replace(self, revision=revision, image=template.get("image"))
        if (config := template.get("config")) is None:
            return shape
        chosen = PoolConfig.model_validate(config)
        options = chosen.options.model_dump(mode="json", exclude_none=True)
        return replace(shape, cores=chosen.cores, memory_mb=chosen.memory, options=options)

    def new_row(self, now: float) -> AgentRow:
        """Return the row of a new agent of the pool."""
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
            image=self.image,
            revision=self.revision,
        )

    def desired(self, pool: pools.PoolRow | None) -> int:
        """Return the desired size of the pool."""
        return min(max(pool.desired if pool else self.minimum, self.minimum), self.maximum)


class Pool:
    """Adjusts the pool on behalf of the leader. `clock` returns Unix seconds."""

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
        """Record that an agent of the pool has ended. A failed one delays the next start."""
        if row.kind is not AgentKind.POOL or row.state is not AgentState.FAILED:
            return
        now = self._clock()
        was_steady = row.running_at is not None and now - row.running_at > STEADY_SECONDS
        self._failures = 1 if was_steady else self._failures + 1
        if self._failures > 1:
            longest = LAST_PAUSE if row.running_at is None else PAUSE_AFTER_RUNNING
            pause = min(FIRST_PAUSE * 2 ** min(self._failures - 2, 30), longest)
            self._not_before = now + pause
            _log.warning("pool.start_delayed", failures=self._failures, pause_seconds=pause)

    async def balance(self) -> list[str]:
        """Add or drain agents to reach the desired size; return those that need a step now.

        Raises LeadershipLost when this process does not lead.
        """
        async with self._database.read() as connection:
            if (await self._step(connection))[0] == Step():
                return []
        async with self._database.write(exclusive="pool") as connection:
            await self._leadership.guard(connection)
            now = self._clock()
            step, roll = await self._step(connection)
            shape = self._shape.of_roll(roll)
            added = [shape.new_row(now) for _ in range(step.start)]
            for row in added:
                await agents.insert_agent(connection, row)
            for agent_id in step.drain:
                await agents.want_stopped(connection, agent_id, now=now)
            if step.ends is not None and roll is not None:
                await rolls.end_roll(connection, roll.revision, step.ends, now=now, reason=step.reason)
        if added or step.drain:
            _log.info("pool.changed", started=len(added), drained=len(step.drain))
        if step.ends is not None and roll is not None:
            log = _log.warning if step.ends is RollStatus.STOPPED else _log.info
            log("pool.roll_over", revision=roll.revision, status=step.ends.value, reason=step.reason)
        return [row.agent_id for row in added] + step.drain

    async def _step(self, connection: Connection) -> tuple[Step, RollRow | None]:
        roll = await rolls.get_roll(connection)
        rows = await agents.list_agents(connection, kind=AgentKind.POOL)
        rolling = roll is not None and roll.status is RollStatus.ROLLING
        failed = await rolls.failed_starts(connection, roll.revision, steady=STEADY_SECONDS) if roll and rolling else []
        desired = self._shape.desired(await pools.get_pool(connection))
        some_leave = rolling or len(rows) > desired
        pool = rolling_pool.Pool(
            rows=rows,
            placed=await agents.sessions_per_agent(connection, [row.agent_id for row in rows]) if some_leave else {},
            desired=desired,
            maximum=self._shape.maximum,
            starts_allowed=0 if self._clock() < self._not_before else self._shape.starts_at_once,
            roll=roll,
            failed=failed,
        )
        return rolling_pool.next_step(pool), roll
