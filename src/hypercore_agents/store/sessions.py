"""Queries about sessions: reads, counts, their end. Placement is in `placement.py`, turns are in `turns.py`."""

from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import bindparam, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.agents import AgentKind
from hypercore_agents.store import session_lifecycle
from hypercore_agents.store.session_lifecycle import ONGOING, SessionState
from hypercore_agents.store.tables import sessions


@dataclass(frozen=True)
class SessionRow:
    """One session as stored. Times in Unix seconds."""

    session_id: str
    user_id: str
    kind: AgentKind
    agent_id: str | None
    generation: int
    state: SessionState
    options: dict[str, Any]
    turn: int
    turn_holder: str | None
    turn_max_tokens: int | None
    turn_temperature: float | None
    created_at: float
    last_used_at: float
    ended_at: float | None


COLUMNS = [sessions.c[field.name] for field in fields(SessionRow)]
"""Columns from which `session_of` makes a SessionRow."""

_GET = select(*COLUMNS).where(sessions.c.session_id == bindparam("session"))  # built once, for every turn


def session_of(row: Any) -> SessionRow:
    """Return the session in a row that has `COLUMNS`."""
    values = {field.name: getattr(row, field.name) for field in fields(SessionRow)}
    return SessionRow(**{**values, "kind": AgentKind(values["kind"]), "state": SessionState(values["state"])})


async def get_session(connection: AsyncConnection, session_id: str) -> SessionRow | None:
    """Return the session, whatever its state."""
    row = (await connection.execute(_GET, {"session": session_id})).one_or_none()
    return None if row is None else session_of(row)


async def list_sessions(
    connection: AsyncConnection,
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    after: tuple[float, str] | None = None,
    limit: int = 1000,
) -> list[SessionRow]:
    """Return sessions that have not ended, most recently used first; `after`: only those after this time and id."""
    query = select(*COLUMNS).where(sessions.c.state.in_(ONGOING))
    if user_id is not None:
        query = query.where(sessions.c.user_id == user_id)
    if agent_id is not None:
        query = query.where(sessions.c.agent_id == agent_id)
    if after is not None:
        used, session_id = after
        ties = (sessions.c.last_used_at == used) & (sessions.c.session_id < session_id)
        query = query.where((sessions.c.last_used_at < used) | ties)
    order = sessions.c.last_used_at.desc(), sessions.c.session_id.desc()
    rows = await connection.execute(query.order_by(*order).limit(limit))
    return [session_of(row) for row in rows]


async def count_by_user(connection: AsyncConnection, *, placed: bool, limit: int) -> dict[str, int]:
    """Return the number of sessions by user, largest first; `placed`: count only sessions placed in the pool."""
    count = func.count().label("count")
    query = select(sessions.c.user_id, count).where(sessions.c.state.in_(ONGOING))
    if placed:
        query = query.where(sessions.c.kind == AgentKind.POOL, sessions.c.agent_id.is_not(None))
    query = query.group_by(sessions.c.user_id).order_by(count.desc(), sessions.c.user_id).limit(limit)
    return {user_id: int(number) for user_id, number in await connection.execute(query)}


async def count_of_user(connection: AsyncConnection, user_id: str, *, most: int) -> int:
    """Return how many sessions of a user have not ended. Counting stops at `most`."""
    some = select(literal(1)).where(sessions.c.user_id == user_id, sessions.c.state.in_(ONGOING)).limit(most)
    return int((await connection.execute(select(func.count()).select_from(some.subquery()))).scalar_one())


async def set_options(connection: AsyncConnection, session_id: str, options: dict[str, Any]) -> None:
    """Replace a new session's frozen options, in the transaction that places it."""
    await connection.execute(update(sessions).where(sessions.c.session_id == session_id).values(options=options))


async def touch(connection: AsyncConnection, session_id: str, *, now: float) -> None:
    """Record that a session is in use without a turn, so that it stays placed."""
    statement = update(sessions).where(sessions.c.session_id == session_id, sessions.c.state != SessionState.ENDED)
    await connection.execute(statement.values(last_used_at=now))


async def end_session(connection: AsyncConnection, session_id: str, *, now: float) -> bool:
    """End a session permanently. Returns False if it is unknown or has ended before."""
    statement = session_lifecycle.end(now=now).where(sessions.c.session_id == session_id)
    return (await connection.execute(statement)).rowcount == 1


async def end_unused(connection: AsyncConnection, *, before: float, now: float) -> int:
    """End sessions that were last used before a time and run no turn; return their number."""
    statement = session_lifecycle.end(now=now).where(sessions.c.last_used_at < before, sessions.c.turn_holder.is_(None))
    return (await connection.execute(statement)).rowcount


async def end_sessions_of(connection: AsyncConnection, agent_id: str, *, now: float) -> int:
    """End all sessions that are placed on an agent; return their number."""
    statement = session_lifecycle.end(now=now).where(sessions.c.agent_id == agent_id)
    return (await connection.execute(statement)).rowcount
