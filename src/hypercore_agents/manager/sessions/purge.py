"""What is left of sessions that are over: the leader deletes their transcripts, workspaces and logs of events,
and ends old sessions.

A deletion at the door purges at once; this looks again and again, so that what a crash or a store that was down left
behind goes too, and what ended otherwise (an agent that was deleted, a session that nobody used for `SESSION_TTL`).
The first looks go over all sessions that ever ended, until none has anything; later ones over those of the last day.
What is deleted, keys of agents included, is then erased from SQLite's log too, where it would stay for any time.
Blobs that lost their last session while the gateway died are deleted by their notes (`store/unused_blobs.py`).
Uploads that never ended, of agents or gateways that died, go when they are older than any upload may take.
"""

from collections.abc import Callable

import structlog

from hypercore_agents.manager.sessions.turn_queue import KEPT_SECONDS
from hypercore_agents.store import events, sessions, stored_bytes, transcripts, turn_queue, unused_blobs, workspaces
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database
from hypercore_agents.store.unused_blobs import UnusedBlobs

_log = structlog.get_logger(__name__)
_AT_ONCE = 100
_RECENT_SECONDS = 86400.0
LOOK_SECONDS = 60.0
_ERASING_SECONDS = 0.2
"""Longest wait for readers of the store; who writes waits too."""
UPLOAD_SECONDS = 3600.0
"""Far longer than an agent waits for an upload."""


class Purge:
    """Deletes the data of sessions that are over. `ttl` is in seconds, 0: never; `clock` returns Unix seconds."""

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

    async def look(self) -> None:
        """End sessions that nobody used for long, and purge those that are over, if this process leads."""
        if not self._leads():
            return
        now = self._clock()
        if self._ttl:
            async with self._database.write() as connection:
                ended = await sessions.end_unused(connection, before=now - self._ttl, now=now)
            if ended:
                _log.info("sessions.expired", count=ended)
        async with self._database.read() as connection:
            over = await workspaces.ended_with_data(connection, since=self._since, limit=_AT_ONCE)
        for session_id in over:
            await self.purge(session_id)
        if len(over) < _AT_ONCE:
            self._since = now - _RECENT_SECONDS
        async with self._database.write_one() as connection:
            await turn_queue.forget_before(connection, now - KEPT_SECONDS)
        if deleted := await self._unused.sweep(now):
            _log.info("blobs.unused_deleted", count=deleted)
        if swept := await self._blobs.sweep(UPLOAD_SECONDS):
            _log.info("blobs.swept", count=swept)
        if not await self._database.erase_deleted(wait=_ERASING_SECONDS):
            _log.info("store.not_erased", reason="other processes are reading the store; the next look tries again")

    async def purge(self, session_id: str) -> None:
        """Delete all that is kept of a session that is over. Safe to repeat."""
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
