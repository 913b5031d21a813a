"""Queries on the ledger: the usage and cost of every model request, written by the gateway; the source of all usage."""

import datetime
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.chat import Usage
from hypercore_agents.api.usage import UsageRow
from hypercore_agents.store.tables import ledger


@dataclass(frozen=True)
class LedgerEntry:
    """One model request. `input_tokens` excludes tokens read from or written to a cache; cost in micro-dollars."""

    created_at: float
    user_id: str
    agent_id: str
    session_id: str
    turn: int
    model: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_creation_tokens: int
    cost_micro_usd: int
    outcome: str
    charge_id: str | None = None
    """Identifies the charge, so that it is written only once. None: written by an earlier release."""


_INPUT = ledger.c.input_tokens + ledger.c.cache_read_tokens + ledger.c.cache_creation_tokens


def _total(column: ColumnElement[int]) -> ColumnElement[int]:
    return func.coalesce(func.sum(column), 0)


_ADD = {
    "sqlite": sqlite.insert(ledger).on_conflict_do_nothing(index_elements=["charge_id"]),
    "postgresql": postgresql.insert(ledger).on_conflict_do_nothing(index_elements=["charge_id"]),
}
SESSION_USAGE = select(
    _total(_INPUT).label("given"),
    _total(ledger.c.output_tokens).label("produced"),
    _total(ledger.c.cost_micro_usd).label("cost"),
).where(ledger.c.session_id == bindparam("session"))
_TURN_USAGE = SESSION_USAGE.where(ledger.c.turn == bindparam("number"))


async def add_entry(connection: AsyncConnection, entry: LedgerEntry) -> None:
    """Write one entry, unless its charge is already written: the answer of an earlier commit may have been lost."""
    day = datetime.datetime.fromtimestamp(entry.created_at, datetime.UTC).date().isoformat()
    await connection.execute(_ADD[connection.dialect.name], {**asdict(entry), "day": day})


async def session_usage(connection: AsyncConnection, session_id: str, turn: int | None = None) -> Usage:
    """Return the usage of a session, or of one of its turns."""
    if turn is None:
        found = await connection.execute(SESSION_USAGE, {"session": session_id})
    else:
        found = await connection.execute(_TURN_USAGE, {"session": session_id, "number": turn})
    return usage_of(*found.one())


def usage_of(given: int, produced: int, cost: int) -> Usage:
    """Return a Usage of sums from the store: input tokens, output tokens and micro-dollars."""
    return Usage(
        input_tokens=int(given),
        output_tokens=int(produced),
        total_tokens=int(given) + int(produced),
        cost_usd=int(cost) / 1e6,
    )


async def turn_output(connection: AsyncConnection, session_id: str, turn: int) -> int:
    """Return the number of output tokens of a turn so far."""
    query = select(_total(ledger.c.output_tokens)).where(ledger.c.session_id == session_id, ledger.c.turn == turn)
    return int((await connection.execute(query)).scalar_one())


async def session_cost(connection: AsyncConnection, session_id: str) -> int:
    """Return the cost of a session in micro-dollars."""
    query = select(_total(ledger.c.cost_micro_usd)).where(ledger.c.session_id == session_id)
    return int((await connection.execute(query)).scalar_one())


async def usage_rows(
    connection: AsyncConnection, *, user_id: str | None, since: str | None, until: str | None, limit: int
) -> list[UsageRow]:
    """Return usage by day, user, agent and model, newest day first. `since`, `until`: YYYY-MM-DD, inclusive."""
    keys = (ledger.c.day, ledger.c.user_id, ledger.c.agent_id, ledger.c.model)
    query: Any = select(
        *keys,
        func.count().label("requests"),
        _total(_INPUT).label("input_tokens"),
        _total(ledger.c.output_tokens).label("output_tokens"),
        _total(ledger.c.cache_read_tokens).label("cache_read_tokens"),
        _total(ledger.c.cache_creation_tokens).label("cache_creation_tokens"),
        _total(ledger.c.cost_micro_usd).label("cost_micro_usd"),
    ).group_by(*keys)
    if user_id is not None:
        query = query.where(ledger.c.user_id == user_id)
    if since is not None:
        query = query.where(ledger.c.day >= since)
    if until is not None:
        query = query.where(ledger.c.day <= until)
    rows = await connection.execute(query.order_by(ledger.c.day.desc(), *keys[1:]).limit(limit))
    return [
        UsageRow(
            day=row.day,
            user_id=row.user_id,
            agent_id=row.agent_id,
            model=row.model,
            requests=row.requests,
            input_tokens=int(row.input_tokens),
            output_tokens=int(row.output_tokens),
            cache_read_tokens=int(row.cache_read_tokens),
            cache_creation_tokens=int(row.cache_creation_tokens),
            cost_usd=int(row.cost_micro_usd) / 1e6,
        )
        for row in rows
    ]
