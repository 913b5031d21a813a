"""Queries on heartbeats: the last one of each agent, overwritten by the next.

They have their own table because a heartbeat must not raise the version of the agent's row, which guards the
reconciler's changes. `at` is the gateway's time, because the clock of a sandbox is not trusted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Float, bindparam, case, func, literal, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.internal import Heartbeat
from hypercore_agents.store.agents import LIVE_STATES
from hypercore_agents.store.tables import agents, heartbeats


@dataclass(frozen=True)
class HeartbeatRow:
    """An agent's last heartbeat. Times in Unix seconds, memory in MB."""

    agent_id: str
    at: float
    ready: bool
    sessions: int
    live: int
    running: int
    waiting: int
    memory_mb: int
    memory_limit_mb: int
    cpu: float | None
    queue_wait_seconds: float | None
    start_wait_seconds: float | None


_FIELDS = tuple(Heartbeat.model_fields)
_COLUMNS = [heartbeats.c[field.name] for field in fields(HeartbeatRow)]


def _upsert(insert: Any) -> Any:
    reported = [bindparam(name, type_=heartbeats.c[name].type) for name in _FIELDS]
    live = select(agents.c.agent_id, bindparam("now", type_=Float), *reported).where(
        agents.c.agent_id == bindparam("agent"), agents.c.state.in_(LIVE_STATES)
    )
    statement = insert(heartbeats).from_select(["agent_id", "at", *_FIELDS], live)
    changed = {name: statement.excluded[name] for name in ("at", *_FIELDS)}
    return statement.on_conflict_do_update(index_elements=["agent_id"], set_=changed).returning(heartbeats.c.agent_id)


_UPSERTS = {"sqlite": _upsert(sqlite.insert), "postgresql": _upsert(postgresql.insert)}


async def put_heartbeat(connection: AsyncConnection, agent_id: str, beat: Heartbeat, *, now: float) -> bool:
    """Store an agent's heartbeat; return whether the agent is live."""
    values = {"agent": agent_id, "now": now, **beat.model_dump()}
    return (await connection.execute(_UPSERTS[connection.dialect.name], values)).scalar_one_or_none() is not None


async def get_heartbeat(connection: AsyncConnection, agent_id: str) -> HeartbeatRow | None:
    """Return an agent's last heartbeat, if any."""
    row = (await connection.execute(select(*_COLUMNS).where(heartbeats.c.agent_id == agent_id))).one_or_none()
    return None if row is None else HeartbeatRow(**row._asdict())


async def suspicious_agents(connection: AsyncConnection, *, since: float) -> list[str]:
    """Return the running agents without a heartbeat since a time, and those that reported that they are not ready."""
    heard = func.coalesce(heartbeats.c.at, literal(0.0))
    last = case((heard > agents.c.running_at, heard), else_=agents.c.running_at)
    query = (
        select(agents.c.agent_id)
        .outerjoin(heartbeats, heartbeats.c.agent_id == agents.c.agent_id)
        .where(agents.c.state == AgentState.RUNNING, or_(last < since, heartbeats.c.ready.is_(False)))
    )
    return list((await connection.execute(query)).scalars())


@dataclass(frozen=True)
class OverdueAgent:
    """An agent whose last heartbeat was `at` (Unix seconds). `given_up`: why it was given up, None if it was not."""

    agent_id: str
    at: float
    given_up: str | None


async def overdue_among(connection: AsyncConnection, agent_ids: Sequence[str], *, since: float) -> list[OverdueAgent]:
    """Return those of the agents without a heartbeat since a time. A healthy agent that drains is not given up."""
    heard = func.coalesce(heartbeats.c.at, literal(0.0))
    running_at = func.coalesce(agents.c.running_at, literal(0.0))
    last = case((heard > running_at, heard), else_=running_at)
    query = (
        select(agents.c.agent_id, agents.c.state, agents.c.error, last.label("at"))
        .outerjoin(heartbeats, heartbeats.c.agent_id == agents.c.agent_id)
        .where(agents.c.agent_id.in_(agent_ids), last < since)
    )
    found = []
    for row in await connection.execute(query):
        given_up = row.error if row.state == AgentState.DRAINING else None
        if row.state in (AgentState.STOPPED, AgentState.FAILED):
            given_up = row.error or "its sandbox is gone"
        found.append(OverdueAgent(row.agent_id, row.at, given_up))
    return found


async def has_witness(connection: AsyncConnection, agent_id: str, *, since: float) -> bool:
    """Return whether another running agent sent a heartbeat since a time, or there is no other running agent."""
    others = (agents.c.state == AgentState.RUNNING, agents.c.agent_id != agent_id)
    heard = select(heartbeats.c.agent_id).join(agents, agents.c.agent_id == heartbeats.c.agent_id)
    if (await connection.execute(heard.where(*others, heartbeats.c.at >= since).limit(1))).first() is not None:
        return True
    return (await connection.execute(select(agents.c.agent_id).where(*others).limit(1))).first() is None


async def pool_heartbeats(connection: AsyncConnection, *, since: float) -> list[HeartbeatRow]:
    """Return the heartbeats of the pool's running agents since a time."""
    query = (
        select(*_COLUMNS)
        .join(agents, agents.c.agent_id == heartbeats.c.agent_id)
        .where(agents.c.kind == AgentKind.POOL, agents.c.state == AgentState.RUNNING, heartbeats.c.at >= since)
    )
    return [HeartbeatRow(**row._asdict()) for row in await connection.execute(query)]
