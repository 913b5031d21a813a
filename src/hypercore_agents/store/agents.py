"""Queries on agents. Every change of a row is guarded by its version, so that of two concurrent writers one fails."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Row, and_, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.store.session_lifecycle import ONGOING
from hypercore_agents.store.tables import agents, sessions

LIVE_STATES = (AgentState.PENDING, AgentState.STARTING, AgentState.RUNNING, AgentState.DRAINING)
"""States in which an agent has or may have a sandbox."""

WANTED_RUNNING = "running"
WANTED_STOPPED = "stopped"


@dataclass(frozen=True)
class AgentRow:
    """One agent as stored. Times in Unix seconds, memory in MB."""

    agent_id: str
    user_id: str
    kind: AgentKind
    state: AgentState
    wanted: str
    backend: str
    cores: int
    memory_mb: int
    gpu_quota_mb: int | None
    capacity: int
    timeout_seconds: int
    options: dict[str, Any]
    tags: dict[str, str]
    address: str | None
    bearer_sealed: bytes | None
    error: str | None
    attempts: int
    version: int
    created_at: float
    updated_at: float
    running_at: float | None
    ended_at: float | None
    image: str | None = None
    revision: int = 0


_COLUMNS = [agents.c[field.name] for field in fields(AgentRow)]


def _row(row: Row[Any]) -> AgentRow:
    values = row._asdict()
    return AgentRow(**{**values, "kind": AgentKind(values["kind"]), "state": AgentState(values["state"])})


async def insert_agent(connection: AsyncConnection, agent: AgentRow) -> None:
    """Insert a new agent."""
    await connection.execute(insert(agents).values({field.name: getattr(agent, field.name) for field in fields(agent)}))


async def count_live(connection: AsyncConnection, user_id: str) -> int:
    """Return how many live dedicated agents a user has."""
    query = select(func.count()).where(
        agents.c.user_id == user_id, agents.c.kind == AgentKind.DEDICATED, agents.c.state.in_(LIVE_STATES)
    )
    return (await connection.execute(query)).scalar_one()


async def get_agent(connection: AsyncConnection, agent_id: str) -> AgentRow | None:
    """Return an agent in any state."""
    row = (await connection.execute(select(*_COLUMNS).where(agents.c.agent_id == agent_id))).one_or_none()
    return None if row is None else _row(row)


async def list_agents(
    connection: AsyncConnection,
    *,
    user_id: str | None = None,
    kind: AgentKind | None = None,
    states: Iterable[AgentState] = LIVE_STATES,
) -> list[AgentRow]:
    """Return agents in the given states, oldest first."""
    query = select(*_COLUMNS).where(agents.c.state.in_(list(states)))
    if user_id is not None:
        query = query.where(agents.c.user_id == user_id)
    if kind is not None:
        query = query.where(agents.c.kind == kind)
    rows = await connection.execute(query.order_by(agents.c.created_at, agents.c.agent_id))
    return [_row(row) for row in rows]


async def change_agent(connection: AsyncConnection, agent_id: str, version: int, *, now: float, **values: Any) -> bool:
    """Change columns of an agent if it still has this version; return whether it had."""
    statement = (
        update(agents)
        .where(agents.c.agent_id == agent_id, agents.c.version == version)
        .values(version=version + 1, updated_at=now, **values)
    )
    return (await connection.execute(statement)).rowcount == 1


async def want_stopped(connection: AsyncConnection, agent_id: str, *, now: float) -> bool:
    """Set the agent's desired state to stopped; return whether the agent is live."""
    statement = (
        update(agents)
        .where(agents.c.agent_id == agent_id, agents.c.state.in_(LIVE_STATES))
        .values(wanted=WANTED_STOPPED, version=agents.c.version + 1, updated_at=now)
    )
    return (await connection.execute(statement)).rowcount == 1


async def set_bearer(connection: AsyncConnection, agent_id: str, sealed: bytes, *, now: float) -> bool:
    """Store the sealed bearer that the manager presents to the agent; return whether the agent is starting."""
    statement = (
        update(agents)
        .where(agents.c.agent_id == agent_id, agents.c.state.in_((AgentState.PENDING, AgentState.STARTING)))
        .values(bearer_sealed=sealed, version=agents.c.version + 1, updated_at=now)
    )
    return (await connection.execute(statement)).rowcount == 1


async def sealed_bearers(connection: AsyncConnection) -> dict[str, bytes]:
    """Return every stored bearer by agent, sealed."""
    query = select(agents.c.agent_id, agents.c.bearer_sealed).where(agents.c.bearer_sealed.is_not(None))
    return {row[0]: row[1] for row in await connection.execute(query)}


async def replace_bearer(connection: AsyncConnection, agent_id: str, old: bytes, new: bytes) -> bool:
    """Replace a bearer by its re-wrapped form; return whether the old one was still stored."""
    statement = update(agents).where(agents.c.agent_id == agent_id, agents.c.bearer_sealed == old)
    return (await connection.execute(statement.values(bearer_sealed=new))).rowcount == 1


async def forget_bearers(connection: AsyncConnection) -> None:
    """Delete all stored bearers."""
    await connection.execute(update(agents).values(bearer_sealed=None))


async def sessions_per_agent(connection: AsyncConnection, agent_ids: Iterable[str] | None = None) -> dict[str, int]:
    """Return how many sessions are placed on each agent that has any."""
    query = (
        select(sessions.c.agent_id, func.count())
        .where(sessions.c.agent_id.is_not(None), sessions.c.state.in_(ONGOING))
        .group_by(sessions.c.agent_id)
    )
    if agent_ids is not None:
        query = query.where(sessions.c.agent_id.in_(list(agent_ids)))
    return {row[0]: row[1] for row in await connection.execute(query)}


async def needing_attention(connection: AsyncConnection) -> list[str]:
    """Return the agents whose requested start or stop has not begun."""
    query = select(agents.c.agent_id).where(
        or_(
            agents.c.state == AgentState.PENDING,
            and_(agents.c.wanted == WANTED_STOPPED, agents.c.state.in_((AgentState.STARTING, AgentState.RUNNING))),
        )
    )
    return list((await connection.execute(query)).scalars())


async def count_states(connection: AsyncConnection) -> dict[AgentKind, dict[AgentState, int]]:
    """Return how many live agents of each kind are in each state."""
    query = (
        select(agents.c.kind, agents.c.state, func.count())
        .where(agents.c.state.in_(LIVE_STATES))
        .group_by(agents.c.kind, agents.c.state)
    )
    counted = {kind: dict.fromkeys(LIVE_STATES, 0) for kind in AgentKind}
    for kind, state, count in await connection.execute(query):
        counted[AgentKind(kind)][AgentState(state)] = int(count)
    return counted
