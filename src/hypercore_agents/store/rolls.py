"""Queries on the pool's last roll: the template of new agents, and the status of their rollout. One row."""

from dataclasses import dataclass, fields, replace
from typing import Any

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.errors import AtCapacity
from hypercore_agents.api.pool import RollStatus
from hypercore_agents.store.pools import POOL
from hypercore_agents.store.tables import agents, rolls


@dataclass(frozen=True)
class RollRow:
    """A roll as stored. A template has `image` and `config`, if they were set. Times in Unix seconds."""

    revision: int
    template: dict[str, Any]
    before_revision: int
    before_template: dict[str, Any]
    status: RollStatus
    at_once: int
    reason: str | None
    started_at: float
    ended_at: float | None


@dataclass(frozen=True)
class FailedStart:
    """An agent of a revision that failed shortly after its start."""

    agent_id: str
    error: str


_COLUMNS = [rolls.c[field.name] for field in fields(RollRow)]


async def get_roll(connection: AsyncConnection) -> RollRow | None:
    """Return the last roll, if any."""
    row = (await connection.execute(select(*_COLUMNS).where(rolls.c.name == POOL))).one_or_none()
    return None if row is None else replace(RollRow(**row._asdict()), status=RollStatus(row.status))


async def put_roll(connection: AsyncConnection, roll: RollRow) -> None:
    """Replace the last roll by a new one. Call it in the `exclusive="pool"` transaction that read the last one."""
    values = {field.name: getattr(roll, field.name) for field in fields(roll)}
    changed = await connection.execute(update(rolls).where(rolls.c.name == POOL).values(**values))
    if not changed.rowcount:
        await connection.execute(insert(rolls).values(name=POOL, **values))


async def end_roll(
    connection: AsyncConnection, revision: int, status: RollStatus, *, now: float, reason: str | None = None
) -> bool:
    """Record the end of a roll; return whether it was in progress."""
    statement = (
        update(rolls)
        .where(rolls.c.name == POOL, rolls.c.revision == revision, rolls.c.status == RollStatus.ROLLING)
        .values(status=status, reason=reason, ended_at=now)
    )
    return (await connection.execute(statement)).rowcount == 1


async def failed_starts(connection: AsyncConnection, revision: int, *, steady: float) -> list[FailedStart]:
    """Return the pool's agents of a revision that failed since the latest start of an agent of it that still runs.

    An agent that ran for `steady` seconds before it failed does not count. An agent that failed because the host had no
    capacity always counts: a later start does not enlarge the host.
    """
    mine = (agents.c.kind == AgentKind.POOL, agents.c.revision == revision)
    last_good = select(func.max(agents.c.running_at)).where(*mine, agents.c.state == AgentState.RUNNING)
    query = select(agents.c.agent_id, agents.c.error).where(
        *mine,
        agents.c.state == AgentState.FAILED,
        or_(
            agents.c.ended_at > func.coalesce(last_good.scalar_subquery(), 0.0),
            agents.c.error.startswith(f"{AtCapacity.type}: ", autoescape=True),
        ),
        agents.c.ended_at - func.coalesce(agents.c.running_at, agents.c.ended_at) < steady,
    )
    return [FailedStart(row.agent_id, row.error or "") for row in await connection.execute(query)]
