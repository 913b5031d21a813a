"""Transcripts: what the Claude CLI wrote of a session, entry by entry, so that any agent can resume it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import transcripts


@dataclass(frozen=True)
class EntryRow:
    """One entry. `subpath` is empty for the session's own transcript, else names a subagent's."""

    subpath: str
    uuid: str
    line: str


async def append(connection: AsyncConnection, session_id: str, entries: Sequence[EntryRow]) -> None:
    """Append entries in order; one that is there already, by its uuid, is left alone."""
    found = select(transcripts.c.uuid).where(
        transcripts.c.session_id == session_id, transcripts.c.uuid.in_([entry.uuid for entry in entries])
    )
    known = set((await connection.execute(found)).scalars())
    new: dict[str, EntryRow] = {}
    for entry in entries:
        if entry.uuid not in known:
            new.setdefault(entry.uuid, entry)
    if new:
        rows = [
            {"session_id": session_id, "subpath": entry.subpath, "uuid": entry.uuid, "line": entry.line}
            for entry in new.values()
        ]
        await connection.execute(insert(transcripts), rows)


async def load(connection: AsyncConnection, session_id: str) -> list[EntryRow]:
    """Return a session's entries in order."""
    query = select(transcripts.c.subpath, transcripts.c.uuid, transcripts.c.line)
    rows = await connection.execute(
        query.where(transcripts.c.session_id == session_id).order_by(transcripts.c.entry_id)
    )
    return [EntryRow(row.subpath, row.uuid, row.line) for row in rows]


async def forget(connection: AsyncConnection, session_id: str) -> None:
    """Delete a session's transcript."""
    await connection.execute(delete(transcripts).where(transcripts.c.session_id == session_id))
