"""Blobs that no session may need any more: a note for each, from before it can be an orphan until it is deleted.

A blob and the rows that refer to it are in two stores, so a process can die between the two writes. Therefore:

- a blob is noted before it gets its name, and the note goes in the transaction that refers to the blob;
- a blob that loses its last reference is noted in the transaction that removes the reference;
- the note goes after the blob store has confirmed the deletion.

Whatever a note still names after `SWEEP_AFTER` seconds is deleted by the manager that leads, unless it is in use.
"""

from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.store import workspaces
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database
from hypercore_agents.store.tables import unused_blobs

_log = structlog.get_logger(__name__)
SWEEP_AFTER = 600.0
"""Seconds from which on a note is taken for one whose process died."""


@dataclass(frozen=True)
class UnusedBlob:
    """A blob that is to be deleted unless a session uses it."""

    owner: str
    digest: str


def _upsert(insert: Any) -> Any:
    statement = insert(unused_blobs)
    changed = {"noted_at": statement.excluded.noted_at}
    return statement.on_conflict_do_update(index_elements=["owner", "digest"], set_=changed)


_UPSERTS = {"sqlite": _upsert(sqlite.insert), "postgresql": _upsert(postgresql.insert)}


async def note_unused(connection: AsyncConnection, owner: str, digest: str, *, now: float) -> None:
    """Note a blob, or renew its note."""
    values = {"owner": owner, "digest": digest, "noted_at": now}
    await connection.execute(_UPSERTS[connection.dialect.name], values)


async def drop_note(connection: AsyncConnection, owner: str, digest: str) -> None:
    """Drop the note of a blob that is deleted or in use. One that is not noted is fine."""
    await connection.execute(delete(unused_blobs).where(unused_blobs.c.owner == owner, unused_blobs.c.digest == digest))


async def noted_before(connection: AsyncConnection, before: float, *, limit: int = 100) -> list[UnusedBlob]:
    """Return the oldest blobs that were noted before a time."""
    query = (
        select(unused_blobs.c.owner, unused_blobs.c.digest)
        .where(unused_blobs.c.noted_at < before)
        .order_by(unused_blobs.c.noted_at)
        .limit(limit)
    )
    return [UnusedBlob(row.owner, row.digest) for row in await connection.execute(query)]


class UnusedBlobs:
    """Deletes noted blobs. The transaction excludes those that refer to the owner's blobs, so none of them can start
    to use a blob between the look and the deletion."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    async def delete(self, owner: str, digest: str) -> None:
        """Delete a noted blob unless it is in use, then drop its note. Raises Unavailable, and the note stays."""
        async with self._database.write(exclusive=f"blobs:{owner}") as connection:
            if not await workspaces.is_used(connection, owner, digest):
                await self._blobs.delete(owner, digest)
            await drop_note(connection, owner, digest)

    async def try_delete(self, owner: str, digest: str) -> bool:
        """Delete as `delete`; say whether it worked. What failed is logged, and `sweep` tries it again."""
        try:
            await self.delete(owner, digest)
        except HypercoreError as error:
            _log.warning("blobs.not_deleted", owner=owner, digest=digest, error=error.message)
            return False
        return True

    async def sweep(self, now: float) -> int:
        """Delete blobs whose note is older than `SWEEP_AFTER`, the oldest first; return how many notes are gone.

        Ends at the first one that fails, which is tried again after all others.
        """
        async with self._database.read() as connection:
            noted = await noted_before(connection, now - SWEEP_AFTER)
        for done, blob in enumerate(noted):
            if not await self.try_delete(blob.owner, blob.digest):
                async with self._database.write() as connection:
                    await note_unused(connection, blob.owner, blob.digest, now=now)
                return done
        return len(noted)
