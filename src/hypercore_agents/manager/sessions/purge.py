"""Deletes the data of ended sessions: transcripts, workspaces and event logs.

The leader runs it. It also ends sessions that were not used for `SESSION_TTL`.

A deletion by a user purges at once. This loop also finds sessions that a crash or an unavailable store left behind, and
those that ended otherwise: with their agent, or because they were not used for `SESSION_TTL`. The first runs examine
all ended sessions until none has data; later runs examine those of the last day. Deleted data, including agents' keys,
is then erased from SQLite's write-ahead log too, where it would otherwise remain for an unlimited time. Blobs whose
last session was deleted while the gateway crashed are deleted by their notes (`store/unused_blobs.py`). Incomplete
uploads, of agents or gateways that died, are deleted once they are older than any upload may take.
"""

from collections.abc import Callable

import structlog

from hypercore_agents.manager.sessions.turn_queue import RETAINED_SECONDS
from hypercore_agents.store import events, sessions, stored_bytes, transcripts, turn_queue, unused_blobs, workspaces
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database
from hypercore_agents.store.unused_blobs import UnusedBlobs

_log = structlog.get_logger(__name__)
_BATCH = 100
_RECENT_SECONDS = 86400.0
INTERVAL_SECONDS = 60.0
_ERASING_SECONDS = 0.2
"""Maximum wait for readers of the store. Writers wait for the same time."""
UPLOAD_SECONDS = 3600.0
"""Much longer than an agent waits for an upload."""


class Purge:
    """Deletes the data of ended sessions. `ttl` is in seconds, 0: never; `clock` returns Unix seconds."""

    def __init__(
        self, database: Database, blobs: Blobs, *, ttl: float, leads: Callable[[], bool], clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._unused = UnusedBlobs(database, blobs)
        self._ttl = ttl
        self._leads = leads
        self._clock = clock
        self._since = 0.0

    async def run_once(self) -> None:
        """End sessions unused for longer than `ttl`, and purge ended ones, if this process leads."""
        if not self._leads():
            return
        now = self._clock()
        if self._ttl:
            async with self._database.write() as connection:
                ended = await sessions.end_unused(connection, before=now - self._ttl, now=now)
            if ended:
                _log.info("sessions.expired", count=ended)
        async with self._database.read() as connection:
            over = await workspaces.ended_with_data(connection, since=self._since, limit=_BATCH)
        for session_id in over:
            await self.purge(session_id)
        if len(over) < _BATCH:
            self._since = now - _RECENT_SECONDS
        async with self._database.write_one() as connection:
            await turn_queue.forget_before(connection, now - RETAINED_SECONDS)
        if deleted := await self._unused.sweep(now):
            _log.info("blobs.unused_deleted", count=deleted)
        if swept := await self._blobs.sweep(UPLOAD_SECONDS):
            _log.info("blobs.incomplete_deleted", count=swept)
        if not await self._database.erase_deleted(wait=_ERASING_SECONDS):
            _log.info("store.not_erased", reason="other processes are reading the store; the next run tries again")

    async def purge(self, session_id: str) -> None:
        """Delete all data of an ended session. Idempotent."""
        async with self._database.write() as connection:
            workspace = await workspaces.get_workspace(connection, session_id)
            await transcripts.forget(connection, session_id)
            await events.forget(connection, session_id)
        if workspace is None:
            return
        async with self._database.write(exclusive=f"blobs:{workspace.owner}") as connection:
            await workspaces.forget(connection, session_id)
            left = await workspaces.stored_by(connection, workspace.owner, besides=None)
            await stored_bytes.reduce_stored(connection, workspace.owner, left)
            await unused_blobs.note_unused(connection, workspace.owner, workspace.digest, now=self._clock())
        await self._unused.delete(workspace.owner, workspace.digest)
