"""What an agent keeps of its sessions outside of itself: transcripts, logs of events, archived workspaces.

Every write names the placement's generation and is refused with 409 when the session has moved on, in the transaction
that writes: an agent that hung and came back cannot write over its successor.
"""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import (
    HypercoreError,
    InternalError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    Unavailable,
)
from hypercore_agents.api.events import EventId, SessionEvents
from hypercore_agents.api.internal import (
    EventEntry,
    Transcript,
    TranscriptAppend,
    TranscriptEntry,
    TranscriptTaken,
    WorkspaceStored,
)
from hypercore_agents.api.text import replace_lone_surrogates
from hypercore_agents.gateway.internal import require_kept, require_placed
from hypercore_agents.kit.limits.json_bounds import JsonBounds
from hypercore_agents.store import events, stored_bytes, transcripts, unused_blobs, workspaces
from hypercore_agents.store.blobs import Blobs, owner_of
from hypercore_agents.store.database import Database
from hypercore_agents.store.events import EventRow
from hypercore_agents.store.transcripts import EntryRow, Page
from hypercore_agents.store.unused_blobs import UnusedBlobs
from hypercore_agents.store.workspaces import WorkspaceRow

EVENT_VALUES_LIMIT = 200_000
"""JSON values in the events of one request."""


class ArchiveMissing(InternalError):
    """An archive that the store notes is not in the blob store. Trying again does not help."""

    status = 410
    retryable = False


class Archives:
    """Answers for agents whose token was checked. `workspace_bytes` bounds the files of an archive, `transcript_bytes`
    all that is kept of one session's transcript, `user_bytes` the archives of one user's sessions together."""

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        *,
        workspace_bytes: int,
        transcript_bytes: int,
        user_bytes: int = 10 << 30,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._unused = UnusedBlobs(database, blobs)
        self._workspace_bytes = workspace_bytes
        self._transcript_bytes = transcript_bytes
        self._user_bytes = user_bytes

    async def append(self, agent_id: str, session_id: str, request: TranscriptAppend) -> TranscriptTaken:
        """Take entries of a transcript and events, and tell what a turn used, if that is asked: one trip per turn.

        Raises NotFound (not placed here), Conflict (a stale generation), InvalidRequest (an event that is no JSON) or
        PayloadTooLarge (the transcript is full; nothing of the request is kept).
        """
        entries = [EntryRow(entry.subpath, entry.uuid, entry.line) for entry in request.entries]
        bounds = JsonBounds(EVENT_VALUES_LIMIT, field="events.data")
        for entry in request.events:
            bounds.feed(entry.data.encode())
        told = [_event(entry, request.generation) for entry in request.events]
        async with self._database.write(exclusive=f"transcript:{session_id}") as connection:
            kept = await require_kept(
                connection,
                agent_id,
                session_id,
                request.generation,
                uuids=[entry.uuid for entry in entries],
                turn=request.turn,
            )
            usage = None if request.turn is None else kept.used
            if usage is not None and told and told[-1].name == "result":
                told[-1] = _with_usage(told[-1], usage)  # the turn's end, which its agent sends before it knows
            try:
                if entries:
                    await transcripts.append(
                        connection, session_id, entries, before=kept.before, limit=self._transcript_bytes
                    )
            except transcripts.TranscriptFull as full:
                raise PayloadTooLarge(
                    f"this session's transcript has {full.size} bytes and may have {self._transcript_bytes} "
                    "(TRANSCRIPT_MAX_MB)",
                    details={"limit_bytes": self._transcript_bytes},
                ) from None
            if told:
                await events.append(connection, session_id, told, now=time.time(), log=kept.log)
        return TranscriptTaken(entries=len(entries), events=len(told), usage=usage)

    async def events(
        self, agent_id: str, session_id: str, generation: int, after: EventId | None, limit: int
    ) -> SessionEvents:
        """Return what is in a session's log after an id. Raises NotFound or Conflict."""
        async with self._database.read() as connection:
            await require_placed(connection, agent_id, session_id, generation)
            return events.listed(session_id, await events.page(connection, session_id, after, limit=limit))

    async def load(self, agent_id: str, session_id: str, generation: int, after: int | None = None) -> Transcript:
        """Return what is kept of a session: a page, or all where no `after` is given. Raises NotFound or Conflict.

        Agents of before there were pages give none, and would take the first for the whole.
        """
        async with self._database.read() as connection:
            await require_placed(connection, agent_id, session_id, generation)
            page = await transcripts.load(connection, session_id, after=after or 0)
            while after is None and page.next is not None:
                more = await transcripts.load(connection, session_id, after=page.next)
                page = Page([*page.entries, *more.entries], more.next)
            workspace = await workspaces.get_workspace(connection, session_id)
        return Transcript(
            entries=[TranscriptEntry(subpath=e.subpath, uuid=e.uuid, line=e.line) for e in page.entries],
            next=page.next,
            workspace=None if workspace is None else workspace.digest,
        )

    async def put_workspace(
        self,
        agent_id: str,
        session_id: str,
        generation: int,
        chunks: AsyncIterator[bytes],
        *,
        digest: str | None = None,
    ) -> WorkspaceStored:
        """Take a workspace's archive, which is stored under its SHA-256; `digest`, if given, must be that.

        Raises NotFound, Conflict, PayloadTooLarge, InvalidRequest or Unavailable.
        """
        async with self._database.read() as connection:
            placed = await require_placed(connection, agent_id, session_id, generation)
        owner = owner_of(placed.session.user_id)

        async def noted(found: str) -> None:
            async with self._database.write() as connection:
                await unused_blobs.note_unused(connection, owner, found, now=time.time())

        limit = _packed(self._workspace_bytes)
        stored = await self._blobs.put(owner, chunks, limit=limit, digest=digest, before_naming=noted)
        row = WorkspaceRow(session_id, owner, stored.digest, stored.size)
        try:
            before = await self._note(agent_id, row, generation)
        except HypercoreError:
            await self._unused.try_delete(owner, stored.digest)
            raise
        if before is not None and before.digest != stored.digest:
            await self._unused.try_delete(before.owner, before.digest)
        return WorkspaceStored(digest=stored.digest, size=stored.size)

    async def _note(self, agent_id: str, row: WorkspaceRow, generation: int) -> WorkspaceRow | None:
        """Note an archive whose blob is there; return what it was before."""
        async with self._database.write(exclusive=f"blobs:{row.owner}") as connection:
            placed = await require_placed(connection, agent_id, row.session_id, generation)
            if not await self._blobs.has(row.owner, row.digest):  # another session let go of the same content just now
                raise Unavailable("the archive was deleted while it was noted; send it again")
            stored = await workspaces.stored_by(connection, row.owner, besides=row)
            if stored + row.size_bytes > self._user_bytes:
                raise PayloadTooLarge(
                    f"the archives of this user's other sessions have {stored >> 20} MB, this one has "
                    f"{row.size_bytes >> 20} MB, and together they may have {self._user_bytes >> 20} MB "
                    "(USER_STORAGE_MB); delete sessions or files",
                    details={"stored_bytes": stored, "limit_bytes": self._user_bytes},
                )
            before = await workspaces.put_workspace(connection, row, now=time.time())
            await stored_bytes.set_stored(connection, row.owner, placed.session.user_id, stored + row.size_bytes)
            await unused_blobs.drop_note(connection, row.owner, row.digest)
            if before is not None and before.digest != row.digest:
                await unused_blobs.note_unused(connection, before.owner, before.digest, now=time.time())
            return before

    async def get_workspace(self, agent_id: str, session_id: str, generation: int, digest: str) -> AsyncIterator[bytes]:
        """Give a workspace's archive. Raises NotFound or Conflict before its first byte."""
        async with self._database.read() as connection:
            await require_placed(connection, agent_id, session_id, generation)
            row = await workspaces.get_workspace(connection, session_id)
        if row is None or row.digest != digest:
            raise NotFound("this session has no such archive")
        if not await self._blobs.has(row.owner, row.digest):
            raise ArchiveMissing(
                "the archive of this session's files is not in the blob store; after BLOB_URL was changed: "
                "hypercore-agents blobs move"
            )
        return self._blobs.get(row.owner, row.digest)


def _packed(limit: int) -> int:
    """Return how large an archive of so many bytes of files may be: incompressible ones do not shrink, and each file
    has a header."""
    return limit + limit // 8 + 64 * 1024


def _event(entry: EventEntry, generation: int) -> EventRow:
    """Return an event as it is kept: JSON of one line, whatever an agent made of it."""
    if entry.generation > generation:
        raise InvalidRequest("an event of a later generation", field="events.generation")
    try:
        data = json.loads(entry.data, parse_constant=_refuse)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InvalidRequest("an event's data is no JSON object", field="events.data")
    line = json.dumps(replace_lone_surrogates(data), ensure_ascii=False, separators=(",", ":"))
    return EventRow((entry.generation, entry.sequence), entry.name, line)


def _with_usage(row: EventRow, usage: Usage) -> EventRow:
    data = {**json.loads(row.data), "usage": usage.model_dump(mode="json", exclude_none=True)}
    return replace(row, data=json.dumps(data, ensure_ascii=False, separators=(",", ":")))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
