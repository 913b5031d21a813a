"""Turns that wait for their session, over all manager processes: a ticket each, and the lowest is next.

A ticket counts while its process holds a lease and for as long as anybody may wait: one that a crash or a store that
was down left behind holds nobody up for longer than that.
"""

from sqlalchemy import bindparam, delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import leases, waiting_turns

_JOIN = insert(waiting_turns).returning(waiting_turns.c.ticket)
_BEFORE = (
    select(waiting_turns.c.ticket)
    .where(
        waiting_turns.c.session_id == bindparam("session"),
        waiting_turns.c.ticket < bindparam("mine"),
        waiting_turns.c.joined_at > bindparam("since"),
        or_(
            waiting_turns.c.holder == bindparam("me"),
            waiting_turns.c.holder.in_(select(leases.c.holder).where(leases.c.expires_at > bindparam("now"))),
        ),
    )
    .limit(1)
)
_LEAVE = delete(waiting_turns).where(waiting_turns.c.ticket == bindparam("mine"))


async def join(connection: AsyncConnection, session_id: str, holder: str, *, now: float) -> int:
    """Stand in a session's line; return the ticket."""
    values = {"session_id": session_id, "holder": holder, "joined_at": now}
    return int((await connection.execute(_JOIN, values)).scalar_one())


async def is_next(
    connection: AsyncConnection, session_id: str, ticket: int, holder: str, *, since: float, now: float
) -> bool:
    """Say whether nobody who came after `since`, and whose process lives, is before a ticket of this process."""
    values = {"session": session_id, "mine": ticket, "me": holder, "since": since, "now": now}
    return (await connection.execute(_BEFORE, values)).first() is None


async def leave(connection: AsyncConnection, ticket: int) -> None:
    """Give a ticket back. Safe to repeat."""
    await connection.execute(_LEAVE, {"mine": ticket})


async def forget_before(connection: AsyncConnection, before: float) -> int:
    """Delete tickets that were taken before a time; return how many."""
    return (await connection.execute(delete(waiting_turns).where(waiting_turns.c.joined_at < before))).rowcount
