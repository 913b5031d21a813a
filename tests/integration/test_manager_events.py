"""The manager's routes of events: a session's events are listed and followed wherever the session is placed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from sqlalchemy import update

from hypercore_agents.manager.change_signals import ChangeSignals
from hypercore_agents.manager.sessions import follow
from hypercore_agents.manager.sessions.access import SessionAccess
from hypercore_agents.manager.sessions.follow import EventStreams
from hypercore_agents.store import events
from hypercore_agents.store.events import EventRow
from hypercore_agents.store.tables import sessions
from support.agent_server import Frame, frames
from support.manager_server import Deployment, StandInAgent, deployed


@pytest_asyncio.fixture
async def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Deployment]:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    async with deployed(tmp_path / "state", min_agents=1) as running:
        await running.warm(1)
        yield running


async def told(deployment: Deployment, session_id: str, *rows: tuple[int, int, str]) -> None:
    async with deployment.database.write() as connection:
        kept = [EventRow((generation, number), name, '{"n":1}') for generation, number, name in rows]
        await events.append(connection, session_id, kept, now=time.time())


async def placed(deployment: Deployment, session_id: str, agent_id: str | None, generation: int = 1) -> None:
    async with deployment.database.write() as connection:
        await connection.execute(
            update(sessions)
            .where(sessions.c.session_id == session_id)
            .values(agent_id=agent_id, generation=generation, turn_holder=None)
        )


async def followed(deployment: Deployment, session_id: str, last: str | None, count: int) -> list[Frame]:
    """Return the next events of a stream."""
    headers = {"last-event-id": last} if last else {}
    path = f"{deployment.url}/v1/agent/session/{session_id}/events/stream"
    found: list[Frame] = []
    async with asyncio.timeout(30), deployment.http.get(path, headers=headers) as answer:
        assert answer.status == 200
        async for frame in frames(answer):
            found.append(frame)
            if len(found) == count:
                break
    return found


def ring(agent: StandInAgent, first: str, *numbers: int, generation: int = 1) -> None:
    """Have an agent's stream hold these events, after an earlier one; the stream then stays open without events."""

    async def answer(request: web.Request) -> web.StreamResponse:
        last = request.headers.get("last-event-id")
        known = [first, *(f"{generation}.{number}" for number in numbers)]
        if request.query.get("held") and last not in known:
            return web.json_response({}, status=409)
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        for shown in known[known.index(last) + 1 :] if last in known else known[1:]:
            await stream.write(f'id: {shown}\nevent: delta\ndata: {{"text":"{shown}"}}\n\n'.encode())
        await asyncio.Event().wait()
        return stream

    agent.events = answer


async def test_events_of_an_unplaced_session_are_listed_and_followed(
    deployment: Deployment,
) -> None:
    session_id = (await deployment.chat())[1]["session_id"]
    agent = deployment.agent
    await told(deployment, session_id, (1, 1, "session"), (1, 4, "text"), (1, 5, "result"))
    await placed(deployment, session_id, None)
    path = f"/v1/agent/session/{session_id}/events"
    status, listed = await deployment.call("GET", path, limit="2")
    assert (status, [e["id"] for e in listed["events"]], listed["next"]) == (200, ["1.1", "1.4"], "1.4")
    _, listed = await deployment.call("GET", path, after="1.4")
    assert ([e["event"] for e in listed["events"]], listed["next"], listed["cut"]) == (["result"], None, False)
    for said in ("after=x", "limit=0", "limit=1001"):
        assert (await deployment.call("GET", f"{path}?{said}"))[0] == 400
    assert (await deployment.call("GET", path, user_id="eve"))[0] == 404
    assert (await deployment.call("GET", f"{path}/stream", user_id="eve"))[0] == 404
    following = asyncio.create_task(followed(deployment, session_id, "1.1", 4))
    await asyncio.sleep(0)
    await told(deployment, session_id, (2, 1, "session"))
    ring(agent, "1.5", 1, 2, generation=2)
    await placed(deployment, session_id, agent.agent_id, 2)
    assert [(f.event, f.id) for f in await following][:2] == [("text", "1.4"), ("result", "1.5")]
    assert [f.id for f in await following][2:] == ["2.1", "2.2"]


async def test_deltas_outside_of_the_ring_are_replaced_by_their_block(
    deployment: Deployment,
) -> None:
    session_id = (await deployment.chat())[1]["session_id"]
    agent = deployment.agent
    await told(deployment, session_id, (1, 1, "session"), (1, 6, "text"))
    ring(agent, "1.1", 2, 3, 4, 5, 6)
    assert [f.id for f in await followed(deployment, session_id, "1.3", 3)] == ["1.4", "1.5", "1.6"]
    ring(agent, "1.4", 5, 6)
    found = await followed_raw(deployment, session_id, "1.3", b"event: text")
    assert found.startswith(b"event: reset")
    assert found.count(b"id: 1.") == 1


async def test_a_lost_agents_turn_ends_with_an_error_and_a_reset(
    deployment: Deployment,
) -> None:
    session_id = (await deployment.chat())[1]["session_id"]
    await told(deployment, session_id, (1, 1, "session"))
    await placed(deployment, session_id, None)
    found = await followed_raw(deployment, session_id, "1.7", b"agent_unreachable")
    assert found.startswith(b"event: reset")
    assert b"id: " not in found


async def test_a_reader_of_deleted_events_gets_a_reset(deployment: Deployment, monkeypatch: Any) -> None:
    monkeypatch.setattr(events, "RETAINED_EVENTS", 10)
    session_id = (await deployment.chat())[1]["session_id"]
    await told(deployment, session_id, *((1, number, "result") for number in range(1, 31)))
    await placed(deployment, session_id, None)
    found = await followed_raw(deployment, session_id, "1.2", b"id: 1.30\n")
    assert found.startswith(b"event: reset")
    found = await followed_raw(deployment, session_id, "1.25", b"id: 1.30\n")
    assert b"event: reset" not in found


class Waits(ChangeSignals):
    """A follower's waits: each calls a function and takes no time."""

    def __init__(self, between: Callable[[int], Awaitable[None]]) -> None:
        super().__init__()
        self.pauses: list[float] = []
        self._between = between

    async def wait(self, key: str, seconds: float = 0) -> None:
        self.pauses.append(seconds)
        await self._between(len(self.pauses))


def follower(deployment: Deployment, session_id: str, last: tuple[int, int], waits: Waits) -> Any:
    """Follow an unplaced session, which needs neither a directory nor an upstream."""
    absent: Any = None
    streams = EventStreams(
        database=deployment.database, directory=absent, upstream=absent, changes=waits, clock=time.time
    )
    return contextlib.aclosing(streams.follow(session_id, SessionAccess(), last))


async def test_a_turn_whose_last_event_is_late_is_not_reported_as_lost(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 3600)
    session_id = (await deployment.chat())[1]["session_id"]
    await told(deployment, session_id, (1, 1, "session"))
    await placed(deployment, session_id, None)

    async def between(wait: int) -> None:
        if wait == 3:
            await told(deployment, session_id, (1, 2, "result"))

    async with follower(deployment, session_id, (1, 1), Waits(between)) as frames:
        assert (await anext(frames)).startswith(b"id: 1.2\nevent: result")


async def test_events_appended_during_a_lookup_are_sent(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = (await deployment.chat())[1]["session_id"]
    await told(deployment, session_id, (1, 1, "session"), (1, 2, "result"))
    await placed(deployment, session_id, None, 2)
    page = events.page

    async def slow_page(*asked: Any, **options: Any) -> Any:
        found = await page(*asked, **options)
        await told(deployment, session_id, (2, 1, "session"))
        return found

    async def nothing(_: int) -> None: ...

    monkeypatch.setattr(events, "page", slow_page)
    async with follower(deployment, session_id, (1, 7), Waits(nothing)) as frames:
        assert (await anext(frames)).startswith(b"event: reset")
        assert (await anext(frames)).startswith(b"id: 2.1\n")


async def test_followers_of_an_idle_session_poll_with_backoff(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = (await deployment.chat())[1]["session_id"]
    await told(deployment, session_id, (1, 1, "session"), (1, 2, "result"))
    await placed(deployment, session_id, None)
    pages: list[Any] = []
    page = events.page

    async def counted(*asked: Any, **options: Any) -> Any:
        pages.append(asked)
        return await page(*asked, **options)

    async def between(wait: int) -> None:
        if wait == 12:
            await told(deployment, session_id, (2, 1, "session"))

    monkeypatch.setattr(events, "page", counted)
    waits = Waits(between)
    async with follower(deployment, session_id, (1, 2), waits) as frames:
        assert (await anext(frames)).startswith(b"id: 2.1\n")
    assert waits.pauses[:2] == [0.05, 0.1]
    assert waits.pauses[11] == follow.MAX_POLL_SECONDS
    assert len(pages) == 2


async def followed_raw(deployment: Deployment, session_id: str, last: str, until: bytes) -> bytes:
    """Return a stream's bytes up to an expected part."""
    path = f"{deployment.url}/v1/agent/session/{session_id}/events/stream"
    found = b""
    async with asyncio.timeout(30), deployment.http.get(path, headers={"last-event-id": last}) as answer:
        while until not in found:
            found += await answer.content.readany()
    return found
