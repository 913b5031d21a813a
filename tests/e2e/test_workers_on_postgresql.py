"""Two manager processes on a real PostgreSQL: quotas, placement and rate limits are exact, also after a worker's death.

The whole platform under `up --demo` with the store in PostgreSQL. Requests are sent concurrently on separate
connections, so that the kernel distributes them to both processes.

The same kills on SQLite: tests/faults/test_kills.py.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from support.platform_parts import Platform, Up, role, up
from support.store_fixtures import postgres_database
from support.waiting import until

CAPACITY, PER_MINUTE, AGENTS_PER_USER = 5, 4, 2
SETTLED_SECONDS = 60.0
pytestmark = [pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, postgres_socket: Path) -> Iterator[Up]:
    with (
        postgres_database(postgres_socket) as url,
        up(
            tmp_path_factory.mktemp("workers"),
            DATABASE_URL=url,
            MAX_CONCURRENT_REQUESTS=str(CAPACITY),
            RATE_LIMIT_PER_MINUTE=str(PER_MINUTE),
            MAX_AGENTS_PER_USER=str(AGENTS_PER_USER),
        ) as started,
    ):
        yield started


@pytest_asyncio.fixture
async def platform(running: Up) -> AsyncIterator[Platform]:
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=90), connector=aiohttp.TCPConnector(force_close=True, limit=0)
    ) as http:
        found = Platform(running, http)
        await until(found.agrees, seconds=120)
        yield found


async def concurrent_chats(platform: Platform, users: list[str]) -> Counter[int]:
    """Start a session for each user concurrently and end those that started; return the statuses."""
    asked = [platform.call("POST", "/v1/agent/chat", {"user_id": user, "prompt": "hi"}) for user in users]
    answers = await asyncio.gather(*asked)
    for status, answer in answers:
        if status == 200:
            assert (await platform.call("DELETE", f"/v1/agent/session/{answer['session_id']}"))[0] == 200
        elif status != 0:
            assert answer["error"]["type"] == {429: "rate_limited", 503: "at_capacity"}[status], answer
    return Counter(status for status, _ in answers)


async def test_rates_placement_and_quotas_are_exact(platform: Platform) -> None:
    assert sum(role(command) == "worker" for command in platform.processes().values()) == 2
    assert await concurrent_chats(platform, ["eve"] * 12) == {200: PER_MINUTE, 429: 12 - PER_MINUTE}
    users = [f"user-{number}" for number in range(12)]
    assert await concurrent_chats(platform, users) == {
        200: CAPACITY,
        503: 12 - CAPACITY,
    }
    body = {"user_id": "mallory", "cores": 1, "memory": 512}
    spawns = await asyncio.gather(*(platform.call("POST", "/v1/agents/spawn", body, wait="false") for _ in range(12)))
    assert Counter(status for status, _ in spawns) == {202: AGENTS_PER_USER, 429: 12 - AGENTS_PER_USER}
    for status, spawned in spawns:
        if status == 202:
            assert (await platform.call("DELETE", "/v1/agents/delete", agent_id=spawned["agent_id"]))[0] == 200


async def test_a_worker_killed_during_a_chat_fails_only_that_turn(platform: Platform) -> None:
    """The other worker's turns continue, the session accepts its next turn, and it counts once against the capacity."""
    before = await platform.settled()
    status, first = await platform.call("POST", "/v1/agent/chat", {"user_id": "ada", "prompt": "remember cobalt"})
    assert status == 200, first
    session = {"user_id": "ada", "session_id": first["session_id"]}
    long = asyncio.create_task(
        platform.call("POST", "/v1/agent/chat", {**session, "prompt": "[[ttft 0.05]] [[rate 20]] [[tokens 100]]"})
    )

    async def runs() -> bool:
        _, found = await platform.call("GET", f"/v1/agent/session/{first['session_id']}")
        return bool(found and found["running"])

    await until(runs, seconds=SETTLED_SECONDS)
    platform.kill("worker", "")
    status, _ = await long
    assert status == 0

    async def goes_on() -> bool:
        status, answer = await platform.call("POST", "/v1/agent/chat", {**session, "prompt": "[[recall 1]]"})
        assert status in (0, 200, 409, 429), answer
        return status == 200 and "cobalt" in answer["content"]

    await until(goes_on, seconds=SETTLED_SECONDS)
    await until(platform.agrees, seconds=SETTLED_SECONDS)
    _, stats = await platform.call("GET", "/v1/agents/stats")
    assert stats["sessions"] == 1
    assert (await platform.call("DELETE", f"/v1/agent/session/{first['session_id']}"))[0] == 200
    with contextlib.suppress(AssertionError):
        await until(lambda: not platform.counts().more_than(before), seconds=SETTLED_SECONDS)
    assert platform.counts().more_than(before) == {}
