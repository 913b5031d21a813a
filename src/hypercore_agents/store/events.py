"""The event log of a session: the events of its streams without deltas, so that any process can replay them.

Invariants: ids rise and are never reused, because only events newer than the newest stored one are appended; so an
event that is sent twice is stored once. A log is limited in events and in characters. The oldest events are deleted;
every row has the count of events before it, so a reader can detect the gap. Call `append` in a write transaction that
excludes others of the same session.
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

RETAINED_EVENTS, RETAINED_CHARACTERS = 2000, 8_000_000
"""What a session's log retains at least; it may grow by a tenth more before its oldest events are deleted."""
_SLACK = 1.1
NOTICE_CHARACTERS = 2000
"""Maximum characters of a session's last notice that an agent receives when it resumes the session."""


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
    """The newest and the oldest event of a log, which an append depends on; all 0 for an empty log."""

    number: int = 0
    position: int = 0
    total: int = 0
    oldest_position: int = 0
    oldest_total: int = 0


@dataclass(frozen=True)
class EventPage:
    """Events in order.

    `cut`: events between `after` and the first one are deleted. `more`: others follow. `known`: the log has an event
    with the id `after` (the id of a delta is not in it).
    """

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
    """Append events in order and delete the oldest if there are too many; return how many were new.

    `log` is read if it is not given.
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
        position - max(1, log.oldest_position) >= _SLACK * RETAINED_EVENTS
        or total - oldest_total >= _SLACK * RETAINED_CHARACTERS
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
            or_(events.c.position <= position - RETAINED_EVENTS, events.c.total <= total - RETAINED_CHARACTERS),
        )
    )


async def page(connection: AsyncConnection, session_id: str, after: EventId | None, *, limit: int) -> EventPage:
    """Return at most `limit` events after an id; None: from the oldest stored event on."""
    seen = 0 if after is None else _number(after)
    values = {"session": session_id, "after": seen}
    found = (await connection.execute(_PAGE, {**values, "limit": limit + 1})).all()
    oldest = (await connection.execute(_OLDEST, {"session": session_id})).one_or_none()
    known = after is None or (await connection.execute(_KNOWN, values)).first() is not None
    rows = [EventRow(_event_id(row.number), row.name, row.data, row.position, row.at) for row in found[:limit]]
    cut = oldest is not None and oldest.position > 1 and seen < oldest.number
    return EventPage(rows, cut, len(found) > limit, known)


def listed(session_id: str, found: EventPage) -> SessionEvents:
    """Return a page in the API's form."""
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
    """Return the text of a notice, up to NOTICE_CHARACTERS; None for any other event, without a query.

    An agent wrote the data: it can be any JSON.
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
