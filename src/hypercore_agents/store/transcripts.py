"""Queries on transcripts: the entries that the Claude CLI wrote for a session, so that any agent can resume it.

The size of a session's transcript is counted as it grows, and an append names its maximum. Transcripts are read in
pages, so that no process needs a whole one in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import BigInteger, bindparam, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.sqlite import DEFERRED
from hypercore_agents.store.tables import transcript_sizes, transcripts

_ENTRY_OVERHEAD = 256
"""Bytes counted per entry in addition to its line, so that a transcript of empty lines is limited too."""
PAGE_ENTRIES, PAGE_CHARACTERS = 1000, 8 * 1024 * 1024
BACK_ENTRIES, BACK_CHARACTERS = 200, 2 * 1024 * 1024

# Statements that every turn runs are built once: building one takes longer than running it.
_KNOWN = select(transcripts.c.uuid).where(
    transcripts.c.session_id == bindparam("session"), transcripts.c.uuid.in_(bindparam("uuids", expanding=True))
)
_SIZE = select(transcript_sizes.c.size_bytes).where(transcript_sizes.c.session_id == bindparam("session"))
_BEFORE = select(
    _SIZE.scalar_subquery().label("size"),
    _KNOWN.with_only_columns(func.count()).scalar_subquery().label("known"),
)
_ADD = insert(transcripts).execution_options(**DEFERRED)
_GROW = (
    update(transcript_sizes)
    .where(transcript_sizes.c.session_id == bindparam("session"))
    .values(size_bytes=bindparam("size", type_=BigInteger))
    .execution_options(**DEFERRED)
)


class TranscriptFull(Exception):
    """The transcript would exceed its maximum size. `size`: its present size in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the transcript has {size} bytes")
        self.size = size


@dataclass(frozen=True)
class Before:
    """A transcript before an append: its size (None: not counted), and how many of the new entries it already has."""

    size: int | None
    known: int


@dataclass(frozen=True)
class EntryRow:
    """One entry. `subpath` is empty for the session's own transcript, else it names a subagent's."""

    subpath: str
    uuid: str
    line: str


@dataclass(frozen=True)
class Page:
    """Entries in order, and the id after which the next page begins; None: this is the last page."""

    entries: list[EntryRow]
    next: int | None


@dataclass(frozen=True)
class Backward:
    """One entry of a session's own transcript, read from the end."""

    entry_id: int
    line: str


@dataclass(frozen=True)
class BackwardPage:
    """Entries, newest first, and the id before which the next page begins; None: this is the last page."""

    entries: list[Backward]
    next: int | None


async def append(
    connection: AsyncConnection,
    session_id: str,
    entries: Sequence[EntryRow],
    *,
    before: Before | None = None,
    limit: int | None = None,
) -> None:
    """Append entries in order; skip those whose uuid is already stored.

    `before` is read if it is not given. Only one writer per session may call it at a time. Raises TranscriptFull if the
    new entries do not fit within `limit` bytes; then none is stored.
    """
    values = {"session": session_id, "uuids": [entry.uuid for entry in entries]}
    if before is None:
        before = Before(*(await connection.execute(_BEFORE, values)).one())
    size = before.size
    known = set((await connection.execute(_KNOWN, values)).scalars()) if before.known else ()
    new: dict[str, EntryRow] = {}
    for entry in entries:
        if entry.uuid not in known:
            new.setdefault(entry.uuid, entry)
    if not new:
        return
    more = sum(len(entry.line.encode()) + _ENTRY_OVERHEAD for entry in new.values())
    if limit is not None and size is not None and size + more > limit:
        raise TranscriptFull(size)
    if size is not None:
        await connection.execute(_GROW, {"session": session_id, "size": size + more})
    else:
        await _count(connection, session_id, more, limit)
    rows = [
        {"session_id": session_id, "subpath": entry.subpath, "uuid": entry.uuid, "line": entry.line}
        for entry in new.values()
    ]
    await connection.execute(_ADD, rows)


async def load(connection: AsyncConnection, session_id: str, *, after: int = 0) -> Page:
    """Return the page of entries after an id."""
    here = (transcripts.c.session_id == session_id, transcripts.c.entry_id > after)
    query = select(transcripts.c.entry_id, func.length(transcripts.c.line).label("size")).where(*here)
    sizes = (await connection.execute(query.order_by(transcripts.c.entry_id).limit(PAGE_ENTRIES + 1))).all()
    last, characters = after, 0
    for number, row in enumerate(sizes):
        characters += row.size
        if number and (number == PAGE_ENTRIES or characters > PAGE_CHARACTERS):
            break
        last = row.entry_id
    columns = select(transcripts.c.subpath, transcripts.c.uuid, transcripts.c.line)
    rows = await connection.execute(
        columns.where(*here, transcripts.c.entry_id <= last).order_by(transcripts.c.entry_id)
    )
    more = bool(sizes) and last != sizes[-1].entry_id
    return Page([EntryRow(row.subpath, row.uuid, row.line) for row in rows], last if more else None)


async def load_back(connection: AsyncConnection, session_id: str, *, before: int | None = None) -> BackwardPage:
    """Return the page of the newest entries of the session's own transcript before an id."""
    here = [transcripts.c.session_id == session_id]
    if before is not None:
        here.append(transcripts.c.entry_id < before)
    # Only ids are sorted, because an index has them; sorting the lines would read them all.
    newest = select(transcripts.c.entry_id).where(*here).order_by(transcripts.c.entry_id.desc())
    ids = list((await connection.execute(newest.limit(BACK_ENTRIES + 1))).scalars())
    asked = select(transcripts.c.entry_id, func.length(transcripts.c.line).label("size")).where(
        transcripts.c.entry_id.in_(ids[:BACK_ENTRIES]), transcripts.c.subpath == ""
    )
    sizes = (await connection.execute(asked.order_by(transcripts.c.entry_id.desc()))).all()
    chosen: list[int] = []
    characters = 0
    for row in sizes:
        characters += row.size
        if chosen and characters > BACK_CHARACTERS:
            break
        chosen.append(row.entry_id)
    lines = select(transcripts.c.entry_id, transcripts.c.line).where(transcripts.c.entry_id.in_(chosen))
    rows = (await connection.execute(lines.order_by(transcripts.c.entry_id.desc()))).all()
    entries = [Backward(row.entry_id, row.line) for row in rows]
    if len(chosen) < len(sizes):
        return BackwardPage(entries, chosen[-1])
    return BackwardPage(entries, ids[BACK_ENTRIES - 1] if len(ids) > BACK_ENTRIES else None)


async def forget(connection: AsyncConnection, session_id: str) -> None:
    """Delete a session's transcript."""
    await connection.execute(delete(transcripts).where(transcripts.c.session_id == session_id))
    await connection.execute(delete(transcript_sizes).where(transcript_sizes.c.session_id == session_id))


async def _count(connection: AsyncConnection, session_id: str, more: int, limit: int | None) -> None:
    """Start the count of a transcript that is new or was written before sizes were counted."""
    lengths = func.sum(func.length(transcripts.c.line) + _ENTRY_OVERHEAD)
    query = select(func.coalesce(lengths, 0)).where(transcripts.c.session_id == session_id)
    counted = int((await connection.execute(query)).scalar_one())
    if limit is not None and counted + more > limit:
        raise TranscriptFull(counted)
    await connection.execute(insert(transcript_sizes).values(session_id=session_id, size_bytes=counted + more))
