"""Queries on workspace archives: which blob holds a session's workspace. `blobs.py` stores the archives."""

from dataclasses import dataclass

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.session_lifecycle import SessionState
from hypercore_agents.store.tables import events, sessions, transcripts, workspaces


@dataclass(frozen=True)
class WorkspaceRow:
    """A session's workspace archive."""

    session_id: str
    owner: str
    digest: str
    size_bytes: int


async def get_workspace(connection: AsyncConnection, session_id: str) -> WorkspaceRow | None:
    """Return a session's workspace archive, None if there is none."""
    row = (await connection.execute(select(workspaces).where(workspaces.c.session_id == session_id))).one_or_none()
    return None if row is None else WorkspaceRow(row.session_id, row.owner, row.digest, row.size_bytes)


async def list_workspaces(connection: AsyncConnection) -> list[WorkspaceRow]:
    """Return the archives of all sessions, ordered by digest."""
    rows = await connection.execute(select(workspaces).order_by(workspaces.c.digest))
    return [WorkspaceRow(row.session_id, row.owner, row.digest, row.size_bytes) for row in rows]


async def put_workspace(connection: AsyncConnection, row: WorkspaceRow, *, now: float) -> WorkspaceRow | None:
    """Record a session's archive; return the previous one, if any."""
    before = await get_workspace(connection, row.session_id)
    values = {"owner": row.owner, "digest": row.digest, "size_bytes": row.size_bytes, "updated_at": now}
    if before is None:
        await connection.execute(insert(workspaces).values(session_id=row.session_id, **values))
    else:
        await connection.execute(update(workspaces).where(workspaces.c.session_id == row.session_id).values(**values))
    return before


async def is_used(connection: AsyncConnection, owner: str, digest: str) -> bool:
    """Return whether any session of this owner has its workspace in this archive."""
    query = select(workspaces.c.session_id).where(workspaces.c.owner == owner, workspaces.c.digest == digest).limit(1)
    return (await connection.execute(query)).first() is not None


async def stored_by(connection: AsyncConnection, owner: str, *, besides: WorkspaceRow | None) -> int:
    """Return the total bytes of an owner's distinct archives, without `besides` and its session's present archive."""
    counted = select(func.max(workspaces.c.size_bytes).label("size")).where(workspaces.c.owner == owner)
    if besides is not None:
        counted = counted.where(workspaces.c.session_id != besides.session_id, workspaces.c.digest != besides.digest)
    each = counted.group_by(workspaces.c.digest).subquery()
    return int((await connection.execute(select(func.coalesce(func.sum(each.c.size), 0)))).scalar_one())


async def forget(connection: AsyncConnection, session_id: str) -> WorkspaceRow | None:
    """Delete a session's record of its archive; return it."""
    before = await get_workspace(connection, session_id)
    await connection.execute(delete(workspaces).where(workspaces.c.session_id == session_id))
    return before


async def ended_with_data(connection: AsyncConnection, *, since: float = 0.0, limit: int = 100) -> list[str]:
    """Return sessions that ended at or after a time and still have a transcript, a workspace or an event log."""
    has_data = (
        select(transcripts.c.entry_id).where(transcripts.c.session_id == sessions.c.session_id).exists()
        | select(events.c.number).where(events.c.session_id == sessions.c.session_id).exists()
        | select(workspaces.c.digest).where(workspaces.c.session_id == sessions.c.session_id).exists()
    )
    query = select(sessions.c.session_id).where(
        sessions.c.state == SessionState.ENDED, sessions.c.ended_at >= since, has_data
    )
    return list((await connection.execute(query.limit(limit))).scalars())
