"""Pool capacity, sessions, event streams and downloads: one user exhausts them, and another user is still served."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hypercore_agents.manager.sessions import reclaim
from support.manager_server import Deployment, completed, deployed
from support.waiting import until


@pytest.fixture(autouse=True)
def _reclaims_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "FRESH_SECONDS", 0.0)


@contextlib.asynccontextmanager
async def small_pool(folder: Path, **settings: Any) -> AsyncIterator[Deployment]:
    async with deployed(folder, min_agents=1, max_agents=1, place_ttl=0, **settings) as deployment:
        await deployment.warm(1)
        yield deployment


async def test_idle_sessions_of_one_user_are_unplaced_for_another_user(tmp_path: Path) -> None:
    async with small_pool(tmp_path, max_concurrent_requests=8, places_per_user=1.0) as deployment:
        agent = deployment.agent
        hoard = [(await deployment.chat(user_id="hog"))[1]["session_id"] for _ in range(8)]
        for number in range(4):
            status, answer = await deployment.chat(user_id=f"victim-{number}")
            assert status == 200, answer
        assert agent.released == hoard[:4], "the least recently used sessions are unplaced"
        status, again = await deployment.chat("again", user_id="hog", session_id=hoard[0])
        assert (status, again["turn"]) == (200, 2), "an unplaced session continues"
        assert agent.released[4] in hoard, "another session of the user with the most sessions is unplaced"


async def test_a_session_that_exists_only_on_its_agent_stays_placed(tmp_path: Path) -> None:
    async with small_pool(tmp_path, max_concurrent_requests=2, places_per_user=1.0) as deployment:
        agent = deployment.agent
        kept, other = [(await deployment.chat(user_id="hog"))[1]["session_id"] for _ in range(2)]
        agent.keeps.add(kept)
        assert (await deployment.chat(user_id="victim"))[0] == 200
        assert agent.released == [other]


async def test_busy_sessions_of_one_user_leave_capacity_for_another_user(tmp_path: Path) -> None:
    async with small_pool(tmp_path, max_concurrent_requests=8) as deployment:
        agent = deployment.agent
        release = asyncio.Event()

        async def wait_for_release(_: web.Request, body: dict[str, Any]) -> web.Response:
            if body["user_id"] == "hog":
                await release.wait()
            return web.json_response(completed(agent, body))

        agent.answer = wait_for_release
        turns = [asyncio.create_task(deployment.chat(user_id="hog")) for _ in range(7)]
        await until(lambda: len(agent.chats) == 7)
        status, refused = await deployment.chat(user_id="hog")
        assert (status, refused["error"]["type"]) == (429, "rate_limited")
        assert refused["error"]["details"] == {"share": "places", "used": 7, "limit": 7}
        assert "PLACES_PER_USER=0.8" in refused["error"]["message"]
        assert (await deployment.chat(user_id="victim"))[0] == 200
        places = (await deployment.stats())["shares"]["places"]
        assert (places["limit"], places["used"]) == (7, {"hog": 7, "victim": 1})
        release.set()
        assert [status for status, _ in await asyncio.gather(*turns)] == [200] * 7
        assert (await deployment.chat(user_id="hog"))[0] == 200, "an idle session of the same user is unplaced"
        assert len(agent.released) == 1


async def test_the_session_limit_applies_to_each_user_separately(tmp_path: Path) -> None:
    async with small_pool(tmp_path, max_sessions_per_user=2) as deployment:
        first = (await deployment.chat(user_id="hog"))[1]["session_id"]
        assert (await deployment.chat(user_id="hog"))[0] == 200
        status, refused = await deployment.chat(user_id="hog")
        assert (status, refused["error"]["type"]) == (429, "rate_limited")
        assert refused["error"]["details"] == {"share": "sessions", "used": 2, "limit": 2}
        assert (await deployment.chat(user_id="victim"))[0] == 200
        assert (await deployment.chat("again", user_id="hog", session_id=first))[0] == 200
        await deployment.call("DELETE", f"/v1/agent/session/{first}")
        assert (await deployment.chat(user_id="hog"))[0] == 200


@pytest.mark.parametrize(
    ("setting", "share", "path"),
    [
        ("max_event_streams_per_user", "event_streams", "events/stream"),
        ("max_downloads_per_user", "downloads", "files/a.bin"),
    ],
)
async def test_open_responses_of_one_user_do_not_block_another_user(
    tmp_path: Path, setting: str, share: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with small_pool(tmp_path, **{setting: 2}) as deployment:
        agent = deployment.agent
        hog = (await deployment.chat(user_id="hog"))[1]["session_id"]
        victim = (await deployment.chat(user_id="victim"))[1]["session_id"]

        async def endless(http_request: web.Request) -> web.StreamResponse:
            answer = web.StreamResponse()
            await answer.prepare(http_request)
            await answer.write(b": begun\n\n")
            await asyncio.Event().wait()
            return answer

        agent.events = endless
        agent.file = endless

        def request(session_id: str) -> Any:
            return deployment.http.get(f"{deployment.url}/v1/agent/session/{session_id}/{path}")

        async with contextlib.AsyncExitStack() as stack:
            opened: list[aiohttp.ClientResponse] = [await stack.enter_async_context(request(hog)) for _ in range(2)]
            assert [answer.status for answer in opened] == [200, 200]
            async with request(hog) as refused:
                error = (await refused.json())["error"]
                assert (refused.status, error["type"]) == (429, "rate_limited")
                assert error["details"] == {"share": share, "used": 2, "limit": 2}
                assert setting.upper() in error["message"]
                assert "retry-after" in refused.headers
            async with request(victim) as served:
                assert served.status == 200
            shown = (await deployment.stats())["shares"][share]
            assert (shown["limit"], shown["used"]["hog"]) == (2, 2)
            for answer in opened:
                answer.close()

        async def slot_is_free() -> bool:
            async with request(hog) as again:
                return bool(again.status == 200)

        await until(slot_is_free)


async def test_an_overloaded_agents_refusal_leaves_no_session(tmp_path: Path) -> None:
    async with small_pool(tmp_path) as deployment:
        agent = deployment.agent

        async def refuse(_: web.Request, __: dict[str, Any]) -> web.Response:
            error = {"type": "at_capacity", "message": "the agent is overloaded", "request_id": "r", "retryable": True}
            return web.json_response({"error": error}, status=503, headers={"retry-after": "17"})

        agent.answer = refuse
        body = {"user_id": "ada", "prompt": "hi"}
        async with deployment.http.post(f"{deployment.url}/v1/agent/chat", json=body) as answer:
            assert (answer.status, answer.headers["retry-after"]) == (503, "17")
            assert (await answer.json())["error"]["type"] == "at_capacity"

        async def session_is_removed() -> bool:
            return bool((await deployment.stats())["sessions"] == 0)

        await until(session_is_removed)
