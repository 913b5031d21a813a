"""Queries on the total size of each user's workspace archives.

The transaction that changes an archive writes the total, and excludes others of the same owner; so a read is one row
and not a sum over all sessions.
"""

from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import stored_bytes


def _upsert(insert: Any) -> Any:
    statement = insert(stored_bytes)
    changed = {"size_bytes": statement.excluded.size_bytes}
    return statement.on_conflict_do_update(index_elements=["owner"], set_=changed)


_UPSERTS = {"sqlite": _upsert(sqlite.insert), "postgresql": _upsert(postgresql.insert)}


async def set_stored(connection: AsyncConnection, owner: str, user_id: str, size: int) -> None:
    """Set the total size of a user's archives."""
    values = {"owner": owner, "user_id": user_id, "size_bytes": size}
    await connection.execute(_UPSERTS[connection.dialect.name], values)


async def reduce_stored(connection: AsyncConnection, owner: str, size: int) -> None:
    """Set the total size of an owner's archives after one was removed."""
    own = stored_bytes.c.owner == owner
    if size:
        await connection.execute(update(stored_bytes).where(own).values(size_bytes=size))
    else:
        await connection.execute(delete(stored_bytes).where(own))


async def stored_of(connection: AsyncConnection, owner: str) -> int:
    """Return the total size of an owner's archives in bytes."""
    query = select(stored_bytes.c.size_bytes).where(stored_bytes.c.owner == owner)
    return int((await connection.execute(query)).scalar_one_or_none() or 0)


async def most_stored(connection: AsyncConnection, *, limit: int) -> dict[str, int]:
    """Return the total sizes of the users with the most, by user."""
    size = stored_bytes.c.size_bytes
    query = select(stored_bytes.c.user_id, size).where(size > 0).order_by(size.desc()).limit(limit)
    return {user_id: int(number) for user_id, number in await connection.execute(query)}
