"""Queries about turns: a session runs one turn at a time, which one manager process holds.

A process holds its turns by a lease (`leases`, by holder). A turn of a process that died is released when its lease
expires.
"""

from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.agents import AgentState
from hypercore_agents.store.session_lifecycle import ONGOING, SessionState
from hypercore_agents.store.sessions import COLUMNS, SessionRow, session_of
from hypercore_agents.store.tables import agents, leases, sessions


def no_turn_runs(now: Any) -> ColumnElement[bool]:
    """Return the condition that a session runs no turn: none is held, or its holder's lease has expired."""
    live = select(leases.c.holder).where(leases.c.expires_at > now)
    return or_(sessions.c.turn_holder.is_(None), sessions.c.turn_holder.not_in(live))


# The statements of every turn are built once: building one takes longer than running it.

_BEGIN = (
    update(sessions)
    .where(
        sessions.c.session_id == bindparam("session"),
        sessions.c.state != SessionState.ENDED,
        sessions.c.agent_id.in_(select(agents.c.agent_id).where(agents.c.state == AgentState.RUNNING)),
        no_turn_runs(bindparam("now")),
    )
    .values(
        turn=sessions.c.turn + 1,
        turn_holder=bindparam("holder"),
        turn_max_tokens=bindparam("max_tokens"),
        turn_temperature=bindparam("temperature"),
        last_used_at=bindparam("now"),
    )
    .returning(*COLUMNS)
)

_END = (
    update(sessions)
    .where(sessions.c.session_id == bindparam("session"), sessions.c.turn == bindparam("number"))
    .values(turn_holder=None, last_used_at=bindparam("now"))
)


async def begin_turn(
    connection: AsyncConnection,
    session_id: str,
    *,
    holder: str,
    max_tokens: int | None,
    temperature: float | None,
    now: float,
) -> SessionRow | None:
    """Begin the session's next turn, held by this manager process.

    Returns None if a turn is running, or if the session is not placed on a running agent.
    """
    values = {"session": session_id, "holder": holder, "max_tokens": max_tokens, "temperature": temperature, "now": now}
    row = (await connection.execute(_BEGIN, values)).one_or_none()
    return None if row is None else session_of(row)


async def end_turn(connection: AsyncConnection, session_id: str, turn: int, *, now: float) -> None:
    """End a turn, if it is still the session's last one."""
    await connection.execute(_END, {"session": session_id, "number": turn, "now": now})


async def count_turns(connection: AsyncConnection, agent_id: str, *, now: float) -> int:
    """Return the number of turns that are running on an agent."""
    live = select(leases.c.holder).where(leases.c.expires_at > now)
    query = select(func.count()).where(
        sessions.c.agent_id == agent_id, sessions.c.state.in_(ONGOING), sessions.c.turn_holder.in_(live)
    )
    return int((await connection.execute(query)).scalar_one())
