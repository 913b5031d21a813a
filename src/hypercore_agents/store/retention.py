"""Deleting rows that are history: each call deletes at most `limit` of one kind, so that no transaction is long.

What still stands for something stays however old it is: an agent that names a session which goes on or has data left, a
session whose data is not purged yet, ledger entries of sessions that go on (their budgets are counted from them). An
ended session that is kept longer than its agent no longer names it.
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
"""Of a session that ended and whose data is purged."""


async def delete_sessions(connection: AsyncConnection, *, before: float, limit: int) -> int:
    """Delete sessions that ended before a time and have no data left; return how many."""
    old = [*_OVER, sessions.c.ended_at < before]
    return await _delete(connection, sessions, sessions.c.session_id, old, limit)


async def delete_agents(connection: AsyncConnection, *, before: float, limit: int) -> int:
    """Delete agents that ended before a time, with their enrolments, unless a session needs them; return how many."""
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
    """Delete ledger entries of days before a time whose sessions do not go on; return how many."""
    day = datetime.datetime.fromtimestamp(before, datetime.UTC).date().isoformat()
    going_on = select(sessions.c.session_id).where(
        sessions.c.session_id == ledger.c.session_id, sessions.c.state.in_(ONGOING)
    )
    return await _delete(connection, ledger, ledger.c.entry_id, [ledger.c.day < day, ~going_on.exists()], limit)


async def delete_rates(connection: AsyncConnection, *, before: float) -> int:
    """Delete what was counted of users who asked for nothing since a time; return how many rows."""
    newest_began = rates.c.window * rates.c.window_seconds / _RATE_SLOTS
    statement = delete(rates).where(newest_began + 2 * rates.c.window_seconds < before)
    return (await connection.execute(statement)).rowcount


async def _delete(
    connection: AsyncConnection, table: Table, key: ColumnElement[Any], old: list[ColumnElement[bool]], limit: int
) -> int:
    chosen = select(key).where(*old).limit(limit)
    return (await connection.execute(delete(table).where(key.in_(chosen)))).rowcount
