"""What an agent stores of its sessions outside of its sandbox: transcripts, event logs and workspace archives.

Every write names the placement's generation. The transaction that writes rejects it with 409 if the session has moved:
an agent that hung and resumes cannot overwrite its successor's data.
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
from hypercore_agents.gateway.internal import require_append_state, require_placed
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
    """An archive that the store refers to is not in the blob store. A retry does not help."""

    status = 410
    retryable = False


class Archives:
    """Stores and returns session data for agents whose token was checked.

    `workspace_bytes` limits the files of an archive, `transcript_bytes` the stored transcript of one session,
    `user_bytes` the archives of one user's sessions together.
    """

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
        """Store entries of a transcript and events; return the usage of `request.turn`, if set: one request per turn.

        Raises NotFound (not placed on this agent), Conflict (a stale generation), InvalidRequest (an event that is not
        JSON) or PayloadTooLarge (the transcript is full; nothing of the request is stored).
        """
        entries = [EntryRow(entry.subpath, entry.uuid, entry.line) for entry in request.entries]
        bounds = JsonBounds(EVENT_VALUES_LIMIT, field="events.data")
        for entry in request.events:
            bounds.feed(entry.data.encode())
        rows = [_event(entry, request.generation) for entry in request.events]
        async with self._database.write(exclusive=f"transcript:{session_id}") as connection:
            state = await require_append_state(
                connection,
                agent_id,
                session_id,
                request.generation,
                uuids=[entry.uuid for entry in entries],
                turn=request.turn,
            )
            usage = None if request.turn is None else state.used
            if usage is not None and rows and rows[-1].name == "result":
                rows[-1] = _with_usage(rows[-1], usage)  # the agent sends the result before it has the usage
            try:
                if entries:
                    await transcripts.append(
                        connection, session_id, entries, before=state.before, limit=self._transcript_bytes
                    )
            except transcripts.TranscriptFull as full:
                raise PayloadTooLarge(
                    f"this session's transcript has {full.size} bytes; the maximum is {self._transcript_bytes} "
                    "(TRANSCRIPT_MAX_MB)",
                    details={"limit_bytes": self._transcript_bytes},
                ) from None
            if rows:
                await events.append(connection, session_id, rows, now=time.time(), log=state.log)
        return TranscriptTaken(entries=len(entries), events=len(rows), usage=usage)

    async def events(
        self, agent_id: str, session_id: str, generation: int, after: EventId | None, limit: int
    ) -> SessionEvents:
        """Return the events of a session's log after an id. Raises NotFound or Conflict."""
        async with self._database.read() as connection:
            await require_placed(connection, agent_id, session_id, generation)
            return events.listed(session_id, await events.page(connection, session_id, after, limit=limit))

    async def load(self, agent_id: str, session_id: str, generation: int, after: int | None = None) -> Transcript:
        """Return a session's stored transcript: one page, or all of it without `after`. Raises NotFound or Conflict.

        Agents of versions without pages send no `after`, and would take the first page for the whole transcript.
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
        """Store a workspace archive under its SHA-256, which must equal `digest` if given.

        Raises NotFound, Conflict, PayloadTooLarge, InvalidRequest or Unavailable.
        """
        async with self._database.read() as connection:
            placed = await require_placed(connection, agent_id, session_id, generation)
        owner = owner_of(placed.session.user_id)

        async def note_unused(found: str) -> None:
            async with self._database.write() as connection:
                await unused_blobs.note_unused(connection, owner, found, now=time.time())

        limit = _packed(self._workspace_bytes)
        stored = await self._blobs.put(owner, chunks, limit=limit, digest=digest, before_naming=note_unused)
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
        """Record a session's archive, whose blob exists; return the previous one."""
        async with self._database.write(exclusive=f"blobs:{row.owner}") as connection:
            placed = await require_placed(connection, agent_id, row.session_id, generation)
            if not await self._blobs.has(row.owner, row.digest):  # another session just dropped the same content
                raise Unavailable("the archive was deleted before it was recorded; send it again")
            stored = await workspaces.stored_by(connection, row.owner, besides=row)
            if stored + row.size_bytes > self._user_bytes:
                raise PayloadTooLarge(
                    f"the archives of this user's other sessions take {stored >> 20} MB and this one takes "
                    f"{row.size_bytes >> 20} MB; the maximum is {self._user_bytes >> 20} MB in all "
                    "(USER_STORAGE_MB): delete sessions or files",
                    details={"stored_bytes": stored, "limit_bytes": self._user_bytes},
                )
            before = await workspaces.put_workspace(connection, row, now=time.time())
            await stored_bytes.set_stored(connection, row.owner, placed.session.user_id, stored + row.size_bytes)
            await unused_blobs.drop_note(connection, row.owner, row.digest)
            if before is not None and before.digest != row.digest:
                await unused_blobs.note_unused(connection, before.owner, before.digest, now=time.time())
            return before

    async def get_workspace(self, agent_id: str, session_id: str, generation: int, digest: str) -> AsyncIterator[bytes]:
        """Yield the bytes of a workspace archive. Raises NotFound or Conflict before the first one."""
        async with self._database.read() as connection:
            await require_placed(connection, agent_id, session_id, generation)
            row = await workspaces.get_workspace(connection, session_id)
        if row is None or row.digest != digest:
            raise NotFound("this session has no such archive")
        if not await self._blobs.has(row.owner, row.digest):
            raise ArchiveMissing(
                "the archive of this session's files is not in the blob store; if BLOB_URL was changed, run: "
                "hypercore-agents blobs move"
            )
        return self._blobs.get(row.owner, row.digest)


def _packed(limit: int) -> int:
    """Return the maximum size of an archive of `limit` bytes of files: incompressible files do not shrink, and each
    file has a header."""
    return limit + limit // 8 + 64 * 1024


def _event(entry: EventEntry, generation: int) -> EventRow:
    """Return an event as it is stored: JSON on one line, whatever the agent sent."""
    if entry.generation > generation:
        raise InvalidRequest("an event has a later generation than the request", field="events.generation")
    try:
        data = json.loads(entry.data, parse_constant=_refuse)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InvalidRequest("the data of an event is not a JSON object", field="events.data")
    line = json.dumps(replace_lone_surrogates(data), ensure_ascii=False, separators=(",", ":"))
    return EventRow((entry.generation, entry.sequence), entry.name, line)


def _with_usage(row: EventRow, usage: Usage) -> EventRow:
    data = {**json.loads(row.data), "usage": usage.model_dump(mode="json", exclude_none=True)}
    return replace(row, data=json.dumps(data, ensure_ascii=False, separators=(",", ":")))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
