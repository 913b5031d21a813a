"""The event log of a session: what its streams told, without the deltas, so that any process can tell it again.

Invariants: ids rise and are never used twice, since only what lies beyond the newest is taken; so an event that is sent
twice is kept once. A log is bounded in events and in characters: the oldest are cut, and as every row knows how many
came before it, a reader can be told. Call `append` in a write transaction that excludes others of the same session.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from sqlalchemy import Integer, bindparam, delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.events import EventId, EventName, LoggedEvent, SessionEvents, show_id
from hypercore_agents.store.tables import events

EVENTS_KEPT, CHARACTERS_KEPT = 2000, 8_000_000
"""What a session's log holds at least; a tenth more may be there before the oldest are cut."""
_SLACK = 1.1
NOTICE_CHARACTERS = 2000
"""What whoever goes on with a session is told of its last notice."""


@dataclass(frozen=True)
class EventRow:
    """One event. `data` is JSON, `at` Unix seconds; `position` counts the session's events from 1."""

    event_id: EventId
    name: str
    data: str
    position: int = 0
    at: float = 0.0


@dataclass(frozen=True)
class LogEnds:
    """The newest and the oldest event of a log, all 0 where it has none: what an append depends on."""

    number: int = 0
    position: int = 0
    total: int = 0
    oldest_position: int = 0
    oldest_total: int = 0


@dataclass(frozen=True)
class EventPage:
    """Events in order. `cut`: some before them, which the reader has not seen, are no longer kept; `more`: others
    follow; `known`: the id after which they come is one of the log's own (a delta's is not)."""

    rows: list[EventRow]
    cut: bool
    more: bool
    known: bool


_COLUMNS = (events.c.number, events.c.name, events.c.position, events.c.total)
_OF_SESSION = events.c.session_id == bindparam("session")
_NEWEST = select(*_COLUMNS).where(_OF_SESSION).order_by(events.c.number.desc()).limit(1)
_OLDEST = select(*_COLUMNS).where(_OF_SESSION).order_by(events.c.number).limit(1)
_KNOWN = select(events.c.position).where(_OF_SESSION, events.c.number == bindparam("after"))
_DATA = select(events.c.data).where(_OF_SESSION, events.c.number == bindparam("number"))
_ADD = insert(events)
_PAGE = (
    select(events.c.number, events.c.name, events.c.data, events.c.position, events.c.at)
    .where(_OF_SESSION, events.c.number > bindparam("after"))
    .order_by(events.c.number)
    .limit(bindparam("limit", type_=Integer))
)


async def append(
    connection: AsyncConnection, session_id: str, rows: Sequence[EventRow], *, now: float, log: LogEnds | None = None
) -> int:
    """Append events in order and cut the oldest where there are too many; return how many were new.

    `log` is looked up if it is not given.
    """
    log = await _ends(connection, session_id) if log is None else log
    number, position, total = log.number, log.position, log.total
    added = []
    for row in rows:
        if _number(row.event_id) <= number:
            continue
        number, position, total = _number(row.event_id), position + 1, total + len(row.data)
        added.append(
            {
                "session_id": session_id, "number": number, "name": row.name, "data": row.data,
                "position": position, "total": total, "at": now,
            }
        )  # fmt: skip
    if not added:
        return 0
    await connection.execute(_ADD, added)
    oldest_total = log.oldest_total or len(rows[0].data)
    if (
        position - max(1, log.oldest_position) >= _SLACK * EVENTS_KEPT
        or total - oldest_total >= _SLACK * CHARACTERS_KEPT
    ):
        await _cut(connection, session_id, number, position, total)
    return len(added)


async def _ends(connection: AsyncConnection, session_id: str) -> LogEnds:
    newest = (await connection.execute(_NEWEST, {"session": session_id})).one_or_none()
    if newest is None:
        return LogEnds()
    oldest = (await connection.execute(_OLDEST, {"session": session_id})).one()
    return LogEnds(newest.number, newest.position, newest.total, oldest.position, oldest.total)


async def _cut(connection: AsyncConnection, session_id: str, number: int, position: int, total: int) -> None:
    await connection.execute(
        delete(events).where(
            events.c.session_id == session_id,
            events.c.number < number,
            or_(events.c.position <= position - EVENTS_KEPT, events.c.total <= total - CHARACTERS_KEPT),
        )
    )


async def page(connection: AsyncConnection, session_id: str, after: EventId | None, *, limit: int) -> EventPage:
    """Return at most `limit` events that come after an id; None: from the oldest that is kept."""
    seen = 0 if after is None else _number(after)
    values = {"session": session_id, "after": seen}
    found = (await connection.execute(_PAGE, {**values, "limit": limit + 1})).all()
    oldest = (await connection.execute(_OLDEST, {"session": session_id})).one_or_none()
    known = after is None or (await connection.execute(_KNOWN, values)).first() is not None
    rows = [EventRow(_event_id(row.number), row.name, row.data, row.position, row.at) for row in found[:limit]]
    cut = oldest is not None and oldest.position > 1 and seen < oldest.number
    return EventPage(rows, cut, len(found) > limit, known)


def listed(session_id: str, found: EventPage) -> SessionEvents:
    """Return a page as the API shows it."""
    shown = [
        LoggedEvent(
            id=show_id(row.event_id),
            event=cast("EventName", row.name),
            at=datetime.fromtimestamp(row.at, UTC).isoformat(timespec="milliseconds"),
            data=json.loads(row.data),
        )
        for row in found.rows
    ]
    last = shown[-1].id if shown and found.more else None
    return SessionEvents(session_id=session_id, count=len(shown), events=shown, cut=found.cut, next=last)


async def newest(connection: AsyncConnection, session_id: str) -> EventRow | None:
    """Return the last event of a session, without its data."""
    row = (await connection.execute(_NEWEST, {"session": session_id})).one_or_none()
    return None if row is None else EventRow(_event_id(row.number), row.name, "", row.position)


async def text_of(connection: AsyncConnection, session_id: str, row: EventRow) -> str | None:
    """Return what a notice says, up to NOTICE_CHARACTERS; None for any other event, which costs nothing.

    An agent wrote it: its data is JSON and may be any.
    """
    if row.name != "notice":
        return None
    found = await connection.execute(_DATA, {"session": session_id, "number": _number(row.event_id)})
    data = found.scalar_one_or_none()
    text = json.loads(data).get("text") if data is not None else None
    return text[:NOTICE_CHARACTERS] if isinstance(text, str) else None


async def forget(connection: AsyncConnection, session_id: str) -> None:
    """Delete a session's log."""
    await connection.execute(delete(events).where(events.c.session_id == session_id))


def _number(event_id: EventId) -> int:
    return event_id[0] << 32 | event_id[1]


def _event_id(number: int) -> EventId:
    return number >> 32, number & 0xFFFFFFFF
