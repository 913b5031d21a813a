"""Request rates per user, counted over all manager processes.

A sliding window by two counters: the current window's count plus the previous window's, weighted by how much of
it the sliding window still covers. So a user never gets two limits' worth around a window's edge, in two numbers per
user and window. A request that is refused is not counted.
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
    "requests_before": bindparam("before"),
}
_UPDATE = (
    update(rates)
    .where(rates.c.user_id == bindparam("user"), rates.c.window_seconds == bindparam("seconds"))
    .values(**_NEW)
)
_INSERT = insert(rates).values(user_id=bindparam("user"), window_seconds=bindparam("seconds"), **_NEW)


def rate_lock(user_id: str) -> str:
    """Return the name under which a user's rates are counted, for `database.write(exclusive=...)`."""
    return f"rates:{user_id}"


async def take(connection: AsyncConnection, user_id: str, limits: Sequence[Limit], *, now: float) -> float | None:
    """Count one request under every limit; returns None, or counts nothing and returns seconds to wait."""
    counted: dict[int, tuple[int, int]] = {}
    known: set[int] = set()
    rows = await connection.execute(_COUNTED, {"user": user_id})
    for row in rows:
        known.add(row.window_seconds)
        age = int(now // row.window_seconds) - row.window
        if age <= 0:
            counted[row.window_seconds] = (row.requests, row.requests_before)
        elif age == 1:
            counted[row.window_seconds] = (0, row.requests)
    waits = [_wait(limit, *counted.get(limit.seconds, (0, 0)), now) for limit in limits]
    if (longest := max(waits, default=0.0)) > 0:
        return longest
    changed = [
        {
            "user": user_id,
            "seconds": limit.seconds,
            "number": int(now // limit.seconds),
            "count": counted.get(limit.seconds, (0, 0))[0] + 1,
            "before": counted.get(limit.seconds, (0, 0))[1],
        }
        for limit in limits
    ]
    for statement, values in (
        (_UPDATE, [value for value in changed if value["seconds"] in known]),
        (_INSERT, [value for value in changed if value["seconds"] not in known]),
    ):
        if values:
            await connection.execute(statement, values)
    return None


def _wait(limit: Limit, count: int, previous: int, now: float) -> float:
    """Return seconds until one more request fits; 0 when it fits now."""
    passed = now % limit.seconds
    if count + previous * (1 - passed / limit.seconds) + 1 <= limit.count:
        return 0.0
    rest = limit.seconds - passed
    if count + 1 <= limit.count and previous > 0:  # it fits once enough of the previous window has slid out
        return min(rest, max(limit.seconds * (1 - (limit.count - count - 1) / previous) - passed, 0.001))
    # it fits in the next window, once enough of this one has slid out
    return rest + max(limit.seconds * (1 - (limit.count - 1) / count), 0.001) if count else rest
