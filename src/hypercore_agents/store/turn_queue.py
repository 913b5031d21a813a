"""Queries about queued turns: each has a ticket, and a session's lowest ticket is next, over all manager processes.

A ticket counts while its process holds a lease, and for as long as a turn may wait. A ticket left behind by a crash or
by an unavailable store therefore delays the others for a limited time only.
"""

from sqlalchemy import bindparam, delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import leases, waiting_turns

_JOIN = insert(waiting_turns).returning(waiting_turns.c.ticket)
_BEFORE = (
    select(waiting_turns.c.ticket)
    .where(
        waiting_turns.c.session_id == bindparam("session"),
        waiting_turns.c.ticket < bindparam("own_ticket"),
        waiting_turns.c.joined_at > bindparam("since"),
        or_(
            waiting_turns.c.holder == bindparam("own_holder"),
            waiting_turns.c.holder.in_(select(leases.c.holder).where(leases.c.expires_at > bindparam("now"))),
        ),
    )
    .limit(1)
)
_LEAVE = delete(waiting_turns).where(waiting_turns.c.ticket == bindparam("own_ticket"))


async def join(connection: AsyncConnection, session_id: str, holder: str, *, now: float) -> int:
    """Add a turn to a session's queue; return its ticket."""
    values = {"session_id": session_id, "holder": holder, "joined_at": now}
    return int((await connection.execute(_JOIN, values)).scalar_one())


async def is_next(
    connection: AsyncConnection, session_id: str, ticket: int, holder: str, *, since: float, now: float
) -> bool:
    """Return whether no other ticket is before this one. Tickets older than `since`, or of dead processes, are
    ignored."""
    values = {"session": session_id, "own_ticket": ticket, "own_holder": holder, "since": since, "now": now}
    return (await connection.execute(_BEFORE, values)).first() is None


async def leave(connection: AsyncConnection, ticket: int) -> None:
    """Remove a ticket from its queue. Idempotent."""
    await connection.execute(_LEAVE, {"own_ticket": ticket})


async def forget_before(connection: AsyncConnection, before: float) -> int:
    """Delete tickets that joined before a time; return their number."""
    return (await connection.execute(delete(waiting_turns).where(waiting_turns.c.joined_at < before))).rowcount
