"""Queries on answers by `Idempotency-Key`: a repeated request gets the answer of the first.

A key belongs to a user and a route. While the first request is being processed, its manager process holds the key. If
that process dies (its lease expires) before it has created anything, the key is free and the request may run again.
"""

from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import idempotency, leases


@dataclass(frozen=True)
class Key:
    """Identifies one idempotent request."""

    user_id: str
    route: str
    key: str


@dataclass(frozen=True)
class Answer:
    """State of a first request. `status` is None until it is answered.

    `made` names the agent or session that it has created. `lost`: the process that ran it is dead.
    """

    body_digest: str
    status: int | None
    answer: bytes | None
    made: str | None = None
    lost: bool = False


def key_lock(key: Key) -> str:
    """Return the name for the `database.write(exclusive=...)` that claims the key."""
    return f"idempotency:{key.user_id}:{key.route}:{key.key}"


async def claim(connection: AsyncConnection, key: Key, body_digest: str, holder: str, *, now: float) -> Answer | None:
    """Claim a key for this process. Returns None if this process must answer it, else the state of its answer."""
    where = (idempotency.c.user_id == key.user_id, idempotency.c.route == key.route, idempotency.c.key == key.key)
    row = (await connection.execute(select(idempotency).where(*where))).one_or_none()
    if row is not None:
        alive = select(leases.c.name).where(leases.c.holder == row.holder, leases.c.expires_at > now)
        lost = row.status is None and (await connection.execute(alive)).first() is None
        if not lost or row.made is not None:
            return Answer(row.body_digest, row.status, row.answer, row.made, lost)
        await connection.execute(delete(idempotency).where(*where))
    await connection.execute(
        insert(idempotency).values(
            user_id=key.user_id, route=key.route, key=key.key, body_digest=body_digest, holder=holder, created_at=now
        )
    )
    return None


async def note_made(connection: AsyncConnection, key: Key, holder: str, made: str) -> None:
    """Record what the request of a key that this process holds has created."""
    await connection.execute(
        update(idempotency)
        .where(
            idempotency.c.user_id == key.user_id,
            idempotency.c.route == key.route,
            idempotency.c.key == key.key,
            idempotency.c.holder == holder,
        )
        .values(made=made)
    )


async def answered(connection: AsyncConnection, key: Key, holder: str, status: int, answer: bytes) -> None:
    """Store the answer of a key that this process holds."""
    await connection.execute(
        update(idempotency)
        .where(
            idempotency.c.user_id == key.user_id,
            idempotency.c.route == key.route,
            idempotency.c.key == key.key,
            idempotency.c.holder == holder,
        )
        .values(status=status, answer=answer)
    )


async def abandon(connection: AsyncConnection, key: Key, holder: str) -> None:
    """Release a key that this process holds without an answer, so that the request may be repeated."""
    await connection.execute(
        delete(idempotency).where(
            idempotency.c.user_id == key.user_id,
            idempotency.c.route == key.route,
            idempotency.c.key == key.key,
            idempotency.c.holder == holder,
            idempotency.c.status.is_(None),
        )
    )


async def forget_before(connection: AsyncConnection, before: float) -> int:
    """Delete keys older than a time; return how many."""
    return (await connection.execute(delete(idempotency).where(idempotency.c.created_at < before))).rowcount
