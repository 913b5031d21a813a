"""The pool's desired size: one number with a version, changed by compare-and-set."""

from dataclasses import dataclass

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import pools

POOL = "pool"


@dataclass(frozen=True)
class PoolRow:
    """The pool's desired size in agents, and the version that a change must name."""

    desired: int
    version: int


async def get_pool(connection: AsyncConnection) -> PoolRow | None:
    """Return the pool's desired size, if it was ever set."""
    row = (await connection.execute(select(pools.c.desired, pools.c.version).where(pools.c.name == POOL))).one_or_none()
    return None if row is None else PoolRow(row.desired, row.version)


async def set_pool(connection: AsyncConnection, desired: int, *, version: int | None, now: float) -> bool:
    """Set the size if the version is unchanged (None: if the pool does not exist yet); return whether it was set."""
    if version is None:
        if await get_pool(connection) is not None:
            return False
        await connection.execute(insert(pools).values(name=POOL, desired=desired, version=1, updated_at=now))
        return True
    statement = (
        update(pools)
        .where(pools.c.name == POOL, pools.c.version == version)
        .values(desired=desired, version=version + 1, updated_at=now)
    )
    return (await connection.execute(statement)).rowcount == 1
