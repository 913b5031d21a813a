"""Deletes old rows. Each call deletes at most `limit` rows of one kind, so that no transaction is long.

Rows in use are retained at any age: an agent of a session that has not ended or has data left, a session whose data is
not purged yet, the ledger entries of sessions that have not ended (budgets are computed from them). If an agent is
deleted before one of its ended sessions, the session loses its reference to the agent.
"""

import datetime
from typing import Any

from sqlalchemy import ColumnElement, Table, and_, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.agents import AgentState
from hypercore_agents.store.session_lifecycle import ONGOING, SessionState
from hypercore_agents.store.tables import agents, events, heartbeats, ledger, rates, sessions, transcripts, workspaces

_ENDED_AGENTS = (AgentState.STOPPED, AgentState.FAILED)
_RATE_SLOTS = 20
"""As in `rates.py`."""


_DATA = [
    select(table.c.session_id).where(table.c.session_id == sessions.c.session_id).exists()
    for table in (transcripts, events, workspaces)
]
_OVER: list[ColumnElement[bool]] = [sessions.c.state == SessionState.ENDED, *(~data for data in _DATA)]
"""Conditions of a session that has ended and whose data is purged."""


async def delete_sessions(connection: AsyncConnection, *, before: float, limit: int) -> int:
    """Delete sessions that ended before a time and have no data left; return how many."""
    old = [*_OVER, sessions.c.ended_at < before]
    return await _delete(connection, sessions, sessions.c.session_id, old, limit)


async def delete_agents(connection: AsyncConnection, *, before: float, limit: int) -> int:
    """Delete agents that ended before a time, and their enrolments, unless a session needs them; return how many."""
    needed = select(sessions.c.session_id).where(sessions.c.agent_id == agents.c.agent_id, ~and_(*_OVER)).exists()
    chosen = select(agents.c.agent_id).where(
        agents.c.state.in_(_ENDED_AGENTS), agents.c.ended_at < before, ~needed
    ).limit(limit)  # fmt: skip
    old = list((await connection.execute(chosen)).scalars())
    if old:
        await connection.execute(update(sessions).where(sessions.c.agent_id.in_(old)).values(agent_id=None))
        await connection.execute(delete(agents).where(agents.c.agent_id.in_(old)))
    return len(old)


async def delete_heartbeats(connection: AsyncConnection, *, limit: int) -> int:
    """Delete the last heartbeats of agents that ended; return how many."""
    ended = select(agents.c.agent_id).where(agents.c.agent_id == heartbeats.c.agent_id).where(
        agents.c.state.in_(_ENDED_AGENTS)
    )  # fmt: skip
    return await _delete(connection, heartbeats, heartbeats.c.agent_id, [ended.exists()], limit)


async def delete_ledger(connection: AsyncConnection, *, before: float, limit: int) -> int:
    """Delete ledger entries of days before a time, of sessions that have ended; return how many."""
    day = datetime.datetime.fromtimestamp(before, datetime.UTC).date().isoformat()
    going_on = select(sessions.c.session_id).where(
        sessions.c.session_id == ledger.c.session_id, sessions.c.state.in_(ONGOING)
    )
    return await _delete(connection, ledger, ledger.c.entry_id, [ledger.c.day < day, ~going_on.exists()], limit)


async def delete_rates(connection: AsyncConnection, *, before: float) -> int:
    """Delete the request counts of users without a request since a time; return how many rows."""
    newest_began = rates.c.window * rates.c.window_seconds / _RATE_SLOTS
    statement = delete(rates).where(newest_began + 2 * rates.c.window_seconds < before)
    return (await connection.execute(statement)).rowcount


async def _delete(
    connection: AsyncConnection, table: Table, key: ColumnElement[Any], old: list[ColumnElement[bool]], limit: int
) -> int:
    chosen = select(key).where(*old).limit(limit)
    return (await connection.execute(delete(table).where(key.in_(chosen)))).rowcount
