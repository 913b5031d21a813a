"""Request rates per user, counted over all manager processes.

A window is cut into `_SLOTS` slots, and a request counts for as long as its slot is not wholly older than the window.
So no interval of a window's length ever has more requests than the limit, and one is let in at most a slot's width
(3 s of a minute, 3 minutes of an hour) later than it might be. A request that is refused is not counted.

Rejected: two counters, the older one weighted by what the window still covers of it: after a burst at the end of one
window nearly as many pass in the next, twice the limit within less than a window. A time per request: up to thousands
of numbers to rewrite at each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.sqlite import AT_ONCE
from hypercore_agents.store.tables import rates


@dataclass(frozen=True)
class Limit:
    """At most `count` requests in any `seconds`."""

    seconds: int
    count: int


# Built once: a turn begins with them.
_COUNTED = select(rates).where(rates.c.user_id == bindparam("user")).execution_options(**AT_ONCE)
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
    """What a limit has counted: the number of the newest slot, and the requests of each, the newest first."""

    newest: int
    slots: list[int]


def rate_lock(user_id: str) -> str:
    """Return the name under which a user's rates are counted, for `database.write(exclusive=...)`."""
    return f"rates:{user_id}"


async def take(connection: AsyncConnection, user_id: str, limits: Sequence[Limit], *, now: float) -> float | None:
    """Count one request under every limit; returns None, or counts nothing and returns seconds to wait."""
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
    """Return the slots as they are now: moved on by those that began since, those that are too old gone."""
    newest, slots = int(now // (limit.seconds / _SLOTS)), []
    # Another process' clock may be a little ahead; by more than a window it was wrong, and what it wrote says nothing.
    if row is not None and row.slots and row.window <= newest + _SLOTS:
        newest = max(newest, row.window)
        slots = [0] * min(newest - row.window, _SLOTS + 1) + [int(count) for count in row.slots.split(",")]
    return _Counted(newest, (slots + [0] * (_SLOTS + 1))[: _SLOTS + 1])


def _wait(limit: Limit, counted: _Counted, now: float) -> float:
    """Return seconds until one more request fits; 0 when it fits now."""
    left = sum(counted.slots)
    for age in range(_SLOTS + 1, 0, -1):
        if left < limit.count:
            break
        left -= counted.slots[age - 1]
    else:
        age = 0
    if age == _SLOTS + 1:
        return 0.0
    gone = counted.newest - age + _SLOTS + 1  # when the slot of this age is wholly older than the window
    return max(gone * limit.seconds / _SLOTS - now, 0.001)
