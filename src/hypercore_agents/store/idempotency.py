"""Answers by `Idempotency-Key`: the same request sent again gets the first one's answer, once.

A key belongs to a user and a route. While the first request is being answered the key is held by that manager
process; one that died (its lease is over) before it had made anything holds nothing, so the request may be done again.
"""

from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import idempotency, leases


@dataclass(frozen=True)
class Key:
    """What names one idempotent request."""

    user_id: str
    route: str
    key: str


@dataclass(frozen=True)
class Answer:
    """What is known of a first request. `status` is None while it is not answered.

    `made` names what it made so far. `lost`: the process that was answering it is dead.
    """

    body_digest: str
    status: int | None
    answer: bytes | None
    made: str | None = None
    lost: bool = False


def key_lock(key: Key) -> str:
    """Return the name for `database.write(exclusive=...)` in which the key is claimed."""
    return f"idempotency:{key.user_id}:{key.route}:{key.key}"


async def claim(connection: AsyncConnection, key: Key, body_digest: str, holder: str, *, now: float) -> Answer | None:
    """Claim a key for this process. Returns None when it is ours to answer, else what is known of the answer."""
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
    """Note what the request under a key that this process holds has made."""
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
    """Give up a key that this process holds without an answer, so that the request may be sent again."""
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
