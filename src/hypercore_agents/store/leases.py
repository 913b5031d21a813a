"""Queries on leases with fencing tokens: which manager process leads, and which ones are alive."""

from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import leases


async def take_lease(connection: AsyncConnection, name: str, holder: str, *, now: float, seconds: float) -> int | None:
    """Take or renew a lease. Returns its fence, which rises with every new holder; None: another process holds it.

    Call it in a write transaction of its own.
    """
    renewed = (
        update(leases)
        .where(leases.c.name == name, leases.c.holder == holder)
        .values(expires_at=now + seconds)
        .returning(leases.c.fence)
    )
    fence: int | None = (await connection.execute(renewed)).scalar_one_or_none()
    if fence is not None:
        return fence
    taken = (
        update(leases)
        .where(leases.c.name == name, or_(leases.c.expires_at <= now, leases.c.holder == ""))
        .values(holder=holder, fence=leases.c.fence + 1, expires_at=now + seconds)
        .returning(leases.c.fence)
    )
    fence = (await connection.execute(taken)).scalar_one_or_none()
    if fence is not None:
        return fence
    if (await connection.execute(select(leases.c.name).where(leases.c.name == name))).one_or_none() is not None:
        return None
    try:
        async with connection.begin_nested():
            await connection.execute(insert(leases).values(name=name, holder=holder, fence=1, expires_at=now + seconds))
    except IntegrityError:
        return None
    return 1


async def holds(connection: AsyncConnection, name: str, fence: int, *, now: float) -> bool:
    """Return whether the lease still has this fence and has not expired; every fenced write checks this."""
    query = select(leases.c.name).where(leases.c.name == name, leases.c.fence == fence, leases.c.expires_at > now)
    return (await connection.execute(query)).one_or_none() is not None


async def holder_lives(connection: AsyncConnection, holder: str, *, now: float) -> bool:
    """Return whether a process holds any lease that has not expired."""
    query = select(leases.c.name).where(leases.c.holder == holder, leases.c.expires_at > now).limit(1)
    return (await connection.execute(query)).first() is not None


async def any_lives(connection: AsyncConnection, *, now: float) -> bool:
    """Return whether any process holds a lease that has not expired."""
    return (
        await connection.execute(select(leases.c.name).where(leases.c.expires_at > now).limit(1))
    ).first() is not None


async def release(connection: AsyncConnection, name: str, holder: str) -> None:
    """Release a lease; its fence stays."""
    await connection.execute(
        update(leases).where(leases.c.name == name, leases.c.holder == holder).values(holder="", expires_at=0)
    )


async def forget_expired(connection: AsyncConnection, prefix: str, *, before: float) -> None:
    """Delete leases under a prefix that expired before a time, which are those of dead processes."""
    await connection.execute(delete(leases).where(leases.c.name.like(f"{prefix}%"), leases.c.expires_at < before))
