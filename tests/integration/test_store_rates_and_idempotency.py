"""Rates are exact over all processes; an idempotent request is answered once."""

import asyncio

from hypercore_agents.store import idempotency, leases
from hypercore_agents.store.database import Database
from hypercore_agents.store.rates import Limit, rate_lock, take

MINUTE, HOUR = Limit(60, 5), Limit(3600, 8)
KEY = idempotency.Key("ada", "spawn", "k1")


async def ask(database: Database, now: float, user: str = "ada") -> float | None:
    async with database.write(exclusive=rate_lock(user)) as connection:
        return await take(connection, user, [MINUTE, HOUR], now=now)


async def test_exactly_the_limit_passes_under_concurrency(database: Database) -> None:
    waits = await asyncio.gather(*(ask(database, 3600.0) for _ in range(12)))
    assert waits.count(None) == 5
    assert all(wait is None or wait > 0 for wait in waits)
    assert await ask(database, 3600.0, user="bob") is None


async def test_the_window_slides_and_the_returned_wait_suffices(database: Database) -> None:
    now = 3600.0 + 59
    for _ in range(5):
        assert await ask(database, now) is None
    assert await ask(database, 3660.0) is not None, "a new window does not reset the limit"
    wait = await ask(database, 3660.0)
    assert wait is not None
    assert await ask(database, 3660.0 + wait - 0.5) is not None
    assert await ask(database, 3660.0 + wait + 0.01) is None


async def test_no_interval_of_a_windows_length_has_more_than_the_limit(database: Database) -> None:
    passed: list[float] = []
    for second in [59.0] * 6 + [60.0 + 1.7 * step for step in range(75)]:
        now = 36000.0 + second
        async with database.write(exclusive=rate_lock("ada")) as connection:
            if await take(connection, "ada", [MINUTE], now=now) is None:
                passed.append(now)
    assert len(passed) >= 12, "a request within the limit waits at most one slot"
    for first in passed:
        assert sum(first <= time < first + MINUTE.seconds for time in passed) <= MINUTE.count


async def test_a_clock_that_was_far_ahead_blocks_no_user(database: Database) -> None:
    for _ in range(MINUTE.count):
        assert await ask(database, 36_000.0 + 86_400) is None
    assert await ask(database, 36_000.0) is None


async def test_the_longer_limit_holds_over_many_short_windows(database: Database) -> None:
    passed = 0
    for minute in range(4):
        for _ in range(3):
            passed += await ask(database, 3600.0 + 120 * minute) is None
    assert passed == 8
    assert (await ask(database, 3600.0 + 600) or 0) > 60


async def test_equal_requests_get_one_answer(database: Database) -> None:
    async def claim(holder: str) -> idempotency.Answer | None:
        async with database.write(exclusive=idempotency.key_lock(KEY)) as connection:
            return await idempotency.claim(connection, KEY, "digest", holder, now=10.0)

    async with database.write() as connection:
        await leases.take_lease(connection, "manager:one", "one", now=10.0, seconds=15)
    claims = await asyncio.gather(*(claim("one") for _ in range(6)))
    assert claims.count(None) == 1
    assert [found.status for found in claims if found] == [None] * 5
    async with database.write() as connection:
        await idempotency.answered(connection, KEY, "two", 500, b"not mine")
        await idempotency.answered(connection, KEY, "one", 200, b"done")
    found = await claim("two")
    assert found == idempotency.Answer("digest", 200, b"done")


async def test_a_key_is_free_after_its_holder_dies(database: Database) -> None:
    async with database.write() as connection:
        await leases.take_lease(connection, "manager:one", "one", now=10.0, seconds=15)
        assert await idempotency.claim(connection, KEY, "digest", "one", now=10.0) is None
        assert await idempotency.claim(connection, KEY, "digest", "two", now=20.0) is not None
        assert await idempotency.claim(connection, KEY, "digest", "two", now=26.0) is None
        await idempotency.abandon(connection, KEY, "one")
        assert await idempotency.claim(connection, KEY, "digest", "one", now=10.0) is None, "two holds no lease"
        await idempotency.abandon(connection, KEY, "one")
        assert await idempotency.claim(connection, KEY, "digest", "two", now=10.0) is None
        assert await idempotency.forget_before(connection, 11.0) == 1
