"""Queries on signals: numbers that one process publishes for others, with the time of their last value."""

from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import signals

API_HEADROOM = "api_headroom"
"""Lowest remaining share of the Claude API's rate limits of the platform's key."""


def _upsert(insert: Any) -> Any:
    values: dict[str, Any] = {"name": bindparam("signal"), "value": bindparam("number"), "at": bindparam("now")}
    statement = insert(signals).values(**values)
    changed = {name: statement.excluded[name] for name in ("value", "at")}
    return statement.on_conflict_do_update(index_elements=["name"], set_=changed)


_UPSERTS = {"sqlite": _upsert(sqlite.insert), "postgresql": _upsert(postgresql.insert)}


async def put_signal(connection: AsyncConnection, name: str, value: float, *, now: float) -> None:
    """Set a signal, with one statement."""
    await connection.execute(_UPSERTS[connection.dialect.name], {"signal": name, "number": value, "now": now})


async def get_signal(connection: AsyncConnection, name: str, *, since: float) -> float | None:
    """Return a signal, if it was set at or after a time."""
    query = select(signals.c.value).where(signals.c.name == name, signals.c.at >= since)
    return (await connection.execute(query)).scalar_one_or_none()
