"""Spawns, shows and deletes agents for the routes, by changing rows. The reconciler starts and stops the sandboxes.

A user's quota is exact: agents are counted and inserted in one transaction, with a lock per user. A user's API key is
sealed before anything else is done with the request.
"""

import asyncio
import datetime
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from hypercore_agents.api.agents import (
    AgentKind,
    AgentList,
    AgentState,
    AgentView,
    HostView,
    MemoryView,
    PoolView,
    ShareView,
    SpawnRequest,
    StatsView,
)
from hypercore_agents.api.errors import DeadlineExceeded, NotFound, RateLimited, Unavailable
from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.compute.base import ComputeBackend, MemoryAccount, SandboxError
from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.fleet import failures, lifecycle
from hypercore_agents.manager.fleet.pool import PoolShape
from hypercore_agents.manager.fleet.tools import configuration
from hypercore_agents.manager.open_responses import most_places
from hypercore_agents.manager.rate_limits import RateLimits
from hypercore_agents.security.sealing import Sealer
from hypercore_agents.store import agents, heartbeats, keys, pools, sessions, signals, stored_bytes
from hypercore_agents.store.agents import LIVE_STATES, WANTED_RUNNING, AgentRow
from hypercore_agents.store.database import Database
from hypercore_agents.store.heartbeats import HeartbeatRow

_log = structlog.get_logger(__name__)
_SHOWN_USERS = 20


@dataclass(frozen=True)
class AgentDefaults:
    """Values that a spawn request does not set, and the limits of all users. Times in seconds."""

    capacity: int
    timeout_seconds: int
    agents_per_user: int
    spawn_wait: float = 150.0
    delete_wait: float = 60.0
    places_per_user: float = 1.0
    sessions_per_user: int = 0
    stored_bytes_per_user: int | None = None


class Agents:
    """Spawns, shows and deletes agents. `clock` returns Unix seconds, `url_of` an agent's base URL."""

    def __init__(
        self,
        *,
        database: Database,
        backend: ComputeBackend,
        sealer: Sealer,
        changes: ChangeSignals,
        wake: Callable[[str], None],
        defaults: AgentDefaults,
        limits: RateLimits,
        pool: PoolShape,
        allow_unisolated_tools: bool,
        heard_within: float,
        url_of: Callable[[str], str],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._backend = backend
        self._sealer = sealer
        self._changes = changes
        self._wake = wake
        self._defaults = defaults
        self._limits = limits
        self._pool = pool
        self._allow_unisolated_tools = allow_unisolated_tools
        self._heard_within = heard_within
        self._url_of = url_of
        self._clock = clock

    async def spawn(self, request: SpawnRequest) -> AgentRow:
        """Insert a new dedicated agent, which the reconciler starts; return at once.

        Raises RateLimited if the user has `MAX_AGENTS_PER_USER` live agents or exceeds a rate limit.
        """
        now = self._clock()
        row = self._new_row(request, now)
        owner = keys.agent_owner(row.agent_id)
        key = request.anthropic_api_key
        sealed = None if key is None else self._sealer.seal(key.get_secret_value(), owner)
        limit = self._defaults.agents_per_user
        async with self._database.write(exclusive=f"agents:{request.user_id}") as connection:
            live = await agents.count_live(connection, request.user_id)
            if live >= limit:
                raise RateLimited(
                    f"user {request.user_id} has {live} agents, and the maximum is {limit} (MAX_AGENTS_PER_USER); "
                    "delete one first",
                    details={"limit": limit, "agents": live},
                    retry_after=60,
                )
            await self._limits.take(connection, request.user_id)
            await agents.insert_agent(connection, row)
            if sealed is not None:
                await keys.put_key(connection, owner, sealed, now=now)
        _log.info("agent.spawn", agent_id=row.agent_id, user_id=row.user_id)
        self._wake(row.agent_id)
        return row

    async def until_running(self, agent_id: str) -> AgentRow:
        """Wait until the agent is ready. Raises the error with which it failed, or DeadlineExceeded."""
        deadline = asyncio.get_running_loop().time() + self._defaults.spawn_wait
        while True:
            row = await self.get(agent_id)
            if row.state is AgentState.RUNNING:
                return row
            if row.error is not None:
                raise failures.restore(row.error, agent_id)
            if row.wanted != WANTED_RUNNING or row.state in lifecycle.ENDED:
                raise NotFound(f"agent {agent_id} was deleted before it was ready")
            if asyncio.get_running_loop().time() > deadline:
                raise DeadlineExceeded(
                    f"agent {agent_id} is still {row.state.value}; check it later with /v1/agents/get",
                    details={"agent_id": agent_id, "status": row.state.value},
                )
            await self._changes.wait(agent_id)

    async def delete(self, agent_id: str, *, user_id: str | None = None) -> AgentRow:
        """Stop an agent and wait until it has ended. Raises Unavailable if that takes too long; the stop continues."""
        await self.get(agent_id, user_id=user_id)
        async with self._database.write() as connection:
            await agents.want_stopped(connection, agent_id, now=self._clock())
        self._wake(agent_id)
        deadline = asyncio.get_running_loop().time() + self._defaults.delete_wait
        while (row := await self.get(agent_id)).state not in lifecycle.ENDED:
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(
                    f"agent {agent_id} is still {row.state.value} and will be stopped; delete it again to wait longer",
                    details={"agent_id": agent_id, "status": row.state.value},
                )
            await self._changes.wait(agent_id)
        return row

    async def get(self, agent_id: str, *, user_id: str | None = None) -> AgentRow:
        """Return an agent. Raises NotFound if it is unknown or, with `user_id`, not this user's."""
        async with self._database.read() as connection:
            row = await agents.get_agent(connection, agent_id)
        if row is None or (user_id is not None and (row.kind is not AgentKind.DEDICATED or row.user_id != user_id)):
            raise NotFound(f"there is no agent {agent_id}")
        return row

    async def logs(self, agent_id: str, *, user_id: str | None, limit: int) -> bytes:
        """Return the last `limit` bytes of the log of an agent's sandbox; empty once it is gone. Raises NotFound."""
        await self.get(agent_id, user_id=user_id)
        return await self._backend.logs(agent_id, limit=limit)

    async def list(self, user_id: str | None) -> AgentList:
        """Return the live agents of a user, or all of them, oldest first."""
        kind = None if user_id is None else AgentKind.DEDICATED
        async with self._database.read() as connection:
            rows = await agents.list_agents(connection, user_id=user_id, kind=kind)
            placed = await agents.sessions_per_agent(connection)
        views = [self._view(row, placed.get(row.agent_id, 0)) for row in rows]
        return AgentList(user_id=user_id, count=len(views), agents=views)

    async def view(self, row: AgentRow) -> AgentView:
        """Return an agent's public view."""
        async with self._database.read() as connection:
            placed = await agents.sessions_per_agent(connection, [row.agent_id])
        return self._view(row, placed.get(row.agent_id, 0))

    async def stats(self) -> StatsView:
        """Count live agents, sessions and capacity."""
        async with self._database.read() as connection:
            rows = await agents.list_agents(connection, states=LIVE_STATES)
            placed = await agents.sessions_per_agent(connection)
            pool = await pools.get_pool(connection)
            since = self._clock() - self._heard_within
            heartbeat_rows = await heartbeats.pool_heartbeats(connection, since=since)
            by_place = await sessions.count_by_user(connection, placed=True, limit=_SHOWN_USERS)
            by_session = await sessions.count_by_user(connection, placed=False, limit=_SHOWN_USERS)
            by_bytes = await stored_bytes.most_stored(connection, limit=_SHOWN_USERS)
            headroom = await signals.get_signal(connection, signals.API_HEADROOM, since=since)
        owners = Counter(row.user_id for row in rows if row.kind is AgentKind.DEDICATED)
        states = Counter(row.state for row in rows)
        pooled = Counter(row.state for row in rows if row.kind is AgentKind.POOL)
        of_pool = {row.agent_id for row in rows if row.kind is AgentKind.POOL}
        starts = sorted(row.running_at - row.created_at for row in rows if row.running_at is not None)
        return StatsView(
            total_agents=len(rows),
            users=len(owners),
            agents_per_user=dict(owners),
            agents_by_status={state.value: states[state] for state in LIVE_STATES},
            pool=PoolView(
                desired=self._pool.desired(pool),
                running=pooled[AgentState.RUNNING],
                starting=pooled[AgentState.PENDING] + pooled[AgentState.STARTING],
                draining=pooled[AgentState.DRAINING],
                sessions=sum(count for agent_id, count in placed.items() if agent_id in of_pool),
                spawn_seconds=starts[len(starts) * 9 // 10] if starts else None,
                **_summary(heartbeat_rows),
                api_headroom=headroom,
            ),
            sessions=sum(placed.values()),
            capacity=sum(row.capacity for row in rows if row.state is AgentState.RUNNING),
            shares={
                "places": ShareView(
                    limit=most_places(
                        sum(
                            row.capacity
                            for row in rows
                            if row.kind is AgentKind.POOL and row.state is AgentState.RUNNING
                        ),
                        self._defaults.places_per_user,
                    ),
                    used=by_place,
                ),
                "sessions": ShareView(limit=self._defaults.sessions_per_user or None, used=by_session),
                "stored_bytes": ShareView(limit=self._defaults.stored_bytes_per_user, used=by_bytes),
            },
            host=await self._host(),
        )

    async def _host(self) -> HostView | None:
        try:
            usage = await self._backend.usage()
        except SandboxError:
            return None
        if usage is None:
            return None
        return HostView(
            cores=usage.cores,
            cores_used=usage.cores_used,
            memory_mb=usage.memory_mb,
            memory_used_mb=usage.memory_used_mb,
            memory_charged_mb=usage.memory_charged_mb,
            agents_memory={name: _memory(account) for name, account in sorted(usage.agents_memory.items())},
            templates_memory=_memory(usage.templates_memory) if usage.templates_memory is not None else None,
            disk_mb=usage.disk_mb,
            disk_used_mb=usage.disk_used_mb,
            load=round(usage.load, 2),
            processors=os.cpu_count() or 0,
            memory_free_mb=usage.memory_free_mb,
            disk_free_mb=usage.disk_free_mb,
        )

    def _new_row(self, request: SpawnRequest, now: float) -> AgentRow:
        return AgentRow(
            agent_id=new_agent_id(),
            user_id=request.user_id,
            kind=AgentKind.DEDICATED,
            state=AgentState.PENDING,
            wanted=WANTED_RUNNING,
            backend=self._backend.name,
            cores=request.cores,
            memory_mb=request.memory,
            gpu_quota_mb=request.gpu_quota,
            capacity=request.max_concurrent or self._defaults.capacity,
            timeout_seconds=request.timeout or self._defaults.timeout_seconds,
            options=request.options().model_dump(mode="json", exclude_none=True),
            tags=request.tags,
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

    def _view(self, row: AgentRow, sessions: int) -> AgentView:
        url = self._url_of(row.agent_id)
        capabilities = self._backend.capabilities
        config = configuration(row.kind, row.capacity, capabilities, allow_unisolated=self._allow_unisolated_tools)
        return AgentView(
            agent_id=row.agent_id,
            url=url,
            metrics_url=f"{url}/metrics",
            status=row.state,
            created_at=iso(row.created_at),
            user_id=row.user_id,
            cores=row.cores,
            memory=row.memory_mb,
            kind=row.kind,
            backend=row.backend,
            isolation=capabilities.isolation,
            tools=config.tools,
            max_concurrent=row.capacity,
            sessions=sessions,
            tags=row.tags,
            error=row.error,
        )


def _memory(account: MemoryAccount) -> MemoryView:
    return MemoryView(given_mb=account.given_mb, charged_mb=account.charged_mb)


def _summary(heartbeat_rows: list[HeartbeatRow]) -> dict[str, Any]:
    """Return a summary of the pool's heartbeats, as fields of PoolView."""
    shares = [row.cpu for row in heartbeat_rows if row.cpu is not None]
    starts = sorted(row.start_wait_seconds for row in heartbeat_rows if row.start_wait_seconds is not None)
    waits = sorted(row.queue_wait_seconds for row in heartbeat_rows if row.queue_wait_seconds is not None)
    return {
        "reporting": len(heartbeat_rows),
        "live": sum(row.live for row in heartbeat_rows),
        "waiting": sum(row.waiting for row in heartbeat_rows),
        "cpu": sum(shares) / len(shares) if shares else None,
        "memory": sum(row.memory_mb / row.memory_limit_mb for row in heartbeat_rows) / len(heartbeat_rows)
        if heartbeat_rows
        else None,
        "queue_wait_seconds": waits[len(waits) * 95 // 100] if waits else None,
        "start_wait_seconds": starts[len(starts) * 95 // 100] if starts else None,
    }


def iso(seconds: float) -> str:
    """Return a time in Unix seconds as ISO 8601 in UTC, with milliseconds."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
