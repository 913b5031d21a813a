"""Implementation of `blobs move`: copy every archive that the store references, and verify its digest."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.store import workspaces
from hypercore_agents.store.blobs import Blobs, owner_of
from hypercore_agents.store.database import Database
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.workspaces import WorkspaceRow

_AT_ONCE = 8
_ANY_SIZE = 1 << 62


@dataclass
class Moved:
    """Counts of the move. `missing` holds the sessions whose archive is in neither store."""

    copied: int = 0
    present: int = 0
    missing: list[str] = field(default_factory=list)


def move(source: str | None, *, delete: bool) -> Moved:
    """Copy all archives from `source` (default: the folder in STATE_DIR) to BLOB_URL, in order of their digests.

    Raises BlobUrlError if a URL cannot be used, and CommandError if both URLs name the same store or one fails during
    the move. Archives copied before a failure remain copied.
    """
    return asyncio.run(_move(ManagerSettings(), source, delete))


async def _are_one(origin: Blobs, target: Blobs) -> bool:
    """Return whether two URLs name the same store, for example through a symbolic link."""
    mark = secrets.token_hex(16)
    owner = owner_of(mark)

    async def content() -> AsyncIterator[bytes]:
        yield mark.encode()

    stored = await target.put(owner, content(), limit=_ANY_SIZE)
    try:
        return await origin.has(owner, stored.digest)
    finally:
        await target.delete(owner, stored.digest)


def _require_folder(url: str, variable: str) -> None:
    """Raise CommandError for a folder that does not exist: opening it as a store would create it."""
    folder = url.removeprefix("file://")
    if folder != url and not Path(folder).is_dir():
        raise CommandError(f"{variable}: there is no folder {folder} to move archives from")


async def _move(settings: ManagerSettings, source: str | None, delete: bool) -> Moved:
    folder = settings.state_dir.absolute() / "blobs"
    here, there = source or f"file://{folder}", settings.blob_url or f"file://{folder}"
    if here.rstrip("/") == there.rstrip("/"):
        raise CommandError(f"the archives are already in {there}: set BLOB_URL to the new store, or use --from URL")
    _require_folder(here, "--from" if source else "STATE_DIR")
    origin, target = Blobs(here, folder), Blobs(there, folder)
    await target.require()
    if delete and await _are_one(origin, target):
        raise CommandError(f"{here} and {there} are the same store, so --delete would delete the only copy")
    database = Database(settings.store_url)
    try:
        await migrate(database)
        async with database.read() as connection:
            rows = await workspaces.list_workspaces(connection)
    finally:
        await database.close()
    moved, places = Moved(), asyncio.Semaphore(_AT_ONCE)

    async def copy(row: WorkspaceRow) -> None:
        async with places:
            if await target.has(row.owner, row.digest):
                moved.present += 1
            elif not await origin.has(row.owner, row.digest):
                moved.missing.append(row.session_id)
                return
            else:
                chunks = origin.get(row.owner, row.digest)
                await target.put(row.owner, chunks, limit=_ANY_SIZE, digest=row.digest)
                moved.copied += 1
            if delete:
                await origin.delete(row.owner, row.digest)

    distinct = {(row.owner, row.digest): row for row in rows}
    try:
        await asyncio.gather(*(copy(row) for row in distinct.values()))
    except Unavailable as error:
        raise CommandError(f"{error.message} ({moved.copied} archives were copied; run the command again)") from None
    return moved
