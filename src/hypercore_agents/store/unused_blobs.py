"""Tracks blobs that may be unused, so that none is orphaned: a note exists from before that moment until the deletion.

A blob and the rows that refer to it are in two stores, so a process can die between the two writes. Therefore:

- a note is written before a blob is named, and deleted in the transaction that refers to the blob;
- a note is written in the transaction that removes the last reference to a blob;
- a note is deleted after the blob store has confirmed the deletion of the blob.

The leading manager deletes the blobs of notes that are older than `SWEEP_AFTER` seconds, unless they are in use.
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
"""Age in seconds from which on the process that wrote a note is considered dead."""


@dataclass(frozen=True)
class UnusedBlob:
    """A blob to be deleted unless a session uses it."""

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
    """Delete the note of a blob that is deleted or in use, if there is one."""
    await connection.execute(delete(unused_blobs).where(unused_blobs.c.owner == owner, unused_blobs.c.digest == digest))


async def noted_before(connection: AsyncConnection, before: float, *, limit: int = 100) -> list[UnusedBlob]:
    """Return the blobs of the oldest notes written before a time."""
    query = (
        select(unused_blobs.c.owner, unused_blobs.c.digest)
        .where(unused_blobs.c.noted_at < before)
        .order_by(unused_blobs.c.noted_at)
        .limit(limit)
    )
    return [UnusedBlob(row.owner, row.digest) for row in await connection.execute(query)]


class UnusedBlobs:
    """Deletes blobs that have a note and are unused. Its transaction excludes those that refer to blobs of the same
    owner, so none of them can start to use a blob between the check and the deletion."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    async def delete(self, owner: str, digest: str) -> None:
        """Delete a blob unless it is in use, then its note. If it raises Unavailable, the note remains."""
        async with self._database.write(exclusive=f"blobs:{owner}") as connection:
            if not await workspaces.is_used(connection, owner, digest):
                await self._blobs.delete(owner, digest)
            await drop_note(connection, owner, digest)

    async def try_delete(self, owner: str, digest: str) -> bool:
        """Do as `delete`; return whether it succeeded. A failure is logged, and `sweep` retries it."""
        try:
            await self.delete(owner, digest)
        except HypercoreError as error:
            _log.warning("blobs.not_deleted", owner=owner, digest=digest, error=error.message)
            return False
        return True

    async def sweep(self, now: float) -> int:
        """Delete the blobs of notes older than `SWEEP_AFTER`, oldest first; return how many notes were processed.

        Stops at the first failure, which is retried after all others.
        """
        async with self._database.read() as connection:
            noted = await noted_before(connection, now - SWEEP_AFTER)
        for done, blob in enumerate(noted):
            if not await self.try_delete(blob.owner, blob.digest):
                async with self._database.write() as connection:
                    await note_unused(connection, blob.owner, blob.digest, now=now)
                return done
        return len(noted)
