"""Queries on the bearers that authenticate users and programs to the manager. Only digests are stored."""

from dataclasses import dataclass

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import bearers


@dataclass(frozen=True)
class BearerRow:
    """One bearer. `scope` is admin, user or metrics; times in Unix seconds."""

    digest: str
    name: str
    scope: str
    user_id: str | None
    created_at: float
    expires_at: float | None


async def add_bearer(connection: AsyncConnection, bearer: BearerRow) -> bool:
    """Store a bearer; return False when its name is taken."""
    if (await connection.execute(select(bearers.c.name).where(bearers.c.name == bearer.name))).first() is not None:
        return False
    values = {column.name: getattr(bearer, column.name) for column in bearers.columns}
    await connection.execute(insert(bearers).values(values))
    return True


async def get_bearer(connection: AsyncConnection, digest: str) -> BearerRow | None:
    """Return the bearer with this digest, expired or not."""
    row = (await connection.execute(select(bearers).where(bearers.c.digest == digest))).one_or_none()
    return None if row is None else BearerRow(**row._asdict())


async def list_bearers(connection: AsyncConnection) -> list[BearerRow]:
    """Return every bearer, by name."""
    rows = await connection.execute(select(bearers).order_by(bearers.c.name))
    return [BearerRow(**row._asdict()) for row in rows]


async def delete_bearer(connection: AsyncConnection, name: str) -> bool:
    """Revoke a bearer by its name; return whether there was one."""
    return (await connection.execute(delete(bearers).where(bearers.c.name == name))).rowcount == 1
