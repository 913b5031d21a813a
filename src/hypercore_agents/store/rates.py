"""Request rates per user, counted over all manager processes.

A window is divided into `_SLOTS` slots, and a request counts until its whole slot is older than the window. So no
interval of a window's length has more requests than the limit, and a request is allowed at most one slot's width (3 s
of a minute, 3 minutes of an hour) later than it could be. A rejected request is not counted.

Rejected: two counters, the older one weighted by the part of it that the window still covers (after a burst at the end
of one window, almost as many requests pass in the next: twice the limit within less than a window); a time per request
(thousands of numbers to rewrite for each).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.sqlite import ON_EVENT_LOOP
from hypercore_agents.store.tables import rates


@dataclass(frozen=True)
class Limit:
    """At most `count` requests in any `seconds`."""

    seconds: int
    count: int


# Built once, because every turn begins with them.
_COUNTED = select(rates).where(rates.c.user_id == bindparam("user")).execution_options(**ON_EVENT_LOOP)
_NEW: dict[str, Any] = {
    "window": bindparam("number"),
    "requests": bindparam("count"),
    "requests_before": 0,
    "slots": bindparam("given"),
}
_UPDATE = (
    update(rates)
    .where(rates.c.user_id == bindparam("user"), rates.c.window_seconds == bindparam("seconds"))
    .values(**_NEW)
)
_INSERT = insert(rates).values(user_id=bindparam("user"), window_seconds=bindparam("seconds"), **_NEW)
_SLOTS = 20


@dataclass(frozen=True)
class _Counted:
    """The requests counted for a limit: the number of the newest slot, and the count of each slot, newest first."""

    newest: int
    slots: list[int]


def rate_lock(user_id: str) -> str:
    """Return the name for the `database.write(exclusive=...)` that counts a user's requests."""
    return f"rates:{user_id}"


async def take(connection: AsyncConnection, user_id: str, limits: Sequence[Limit], *, now: float) -> float | None:
    """Count one request for every limit and return None; or count nothing and return the seconds to wait."""
    rows = {row.window_seconds: row for row in await connection.execute(_COUNTED, {"user": user_id})}
    counted = {limit: _counted(limit, rows.get(limit.seconds), now) for limit in limits}
    if (longest := max((_wait(limit, counted[limit], now) for limit in limits), default=0.0)) > 0:
        return longest
    changed = [
        {
            "user": user_id,
            "seconds": limit.seconds,
            "number": found.newest,
            "count": sum(found.slots) + 1,
            "given": ",".join(map(str, [found.slots[0] + 1, *found.slots[1:]])),
        }
        for limit, found in counted.items()
    ]
    for statement, values in (
        (_UPDATE, [value for value in changed if value["seconds"] in rows]),
        (_INSERT, [value for value in changed if value["seconds"] not in rows]),
    ):
        if values:
            await connection.execute(statement, values)
    return None


def _counted(limit: Limit, row: Any, now: float) -> _Counted:
    """Return the slots as of now: with those that have begun since, without those that are too old."""
    newest, slots = int(now // (limit.seconds / _SLOTS)), []
    # The clock of another process may be slightly ahead. If it is ahead by more than a window, its row is ignored.
    if row is not None and row.slots and row.window <= newest + _SLOTS:
        newest = max(newest, row.window)
        slots = [0] * min(newest - row.window, _SLOTS + 1) + [int(count) for count in row.slots.split(",")]
    return _Counted(newest, (slots + [0] * (_SLOTS + 1))[: _SLOTS + 1])


def _wait(limit: Limit, counted: _Counted, now: float) -> float:
    """Return the seconds until one more request fits; 0 if it fits now."""
    left = sum(counted.slots)
    for age in range(_SLOTS + 1, 0, -1):
        if left < limit.count:
            break
        left -= counted.slots[age - 1]
    else:
        age = 0
    if age == _SLOTS + 1:
        return 0.0
    gone = counted.newest - age + _SLOTS + 1  # the slot number from which on the slot of this age no longer counts
    return max(gone * limit.seconds / _SLOTS - now, 0.001)
