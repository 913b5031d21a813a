"""`Idempotency-Key` and the rate limits, over HTTP with a real store."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hypercore_agents.api.errors import ModelFailed
from hypercore_agents.manager.idempotency import RETAINED_SECONDS
from hypercore_agents.store import idempotency, tables
from support.manager_server import Deployment, completed, deployed, frame, managing, settings_for
from support.waiting import until

KEY = {"Idempotency-Key": "order-66"}


async def chat(pooled: Deployment, prompt: str = "hello", *, key: dict[str, str] = KEY, **body: Any) -> tuple[int, Any]:
    sent = {"user_id": "ada", "prompt": prompt, **body}
    return await pooled.call("POST", "/v1/agent/chat", sent, headers=key)


async def test_a_repeated_chat_gets_the_same_response_and_runs_once(pooled: Deployment) -> None:
    first = await chat(pooled)
    assert first[0] == 200
    assert await chat(pooled) == first
    assert len(pooled.agent.chats) == 1
    body = {"user_id": "ada", "prompt": "hello"}
    async with pooled.http.post(f"{pooled.url}/v1/agent/chat", json=body, headers=KEY) as again:
        assert again.headers["idempotent-replayed"] == "true"
    assert (await chat(pooled, key={}))[1]["session_id"] != first[1]["session_id"]


async def test_a_repeated_streamed_chat_gets_the_same_stream(pooled: Deployment) -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(frame("delta", {"text": "a"}))
        await response.write(frame("result", completed(pooled.agent, body)))
        return response

    pooled.agent.answer = answer
    first = await chat(pooled, stream=True)
    assert first[1].count("event: ") == 2
    assert await chat(pooled, stream=True) == first
    assert len(pooled.agent.chats) == 1


async def test_a_disconnected_client_gets_the_response_by_repeating(pooled: Deployment) -> None:
    go_on = asyncio.Event()

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(frame("delta", {"text": "a"}))
        await go_on.wait()
        await response.write(frame("result", completed(pooled.agent, body)))
        return response

    pooled.agent.answer = answer
    body = {"user_id": "ada", "prompt": "hello", "stream": True}
    cut = await pooled.http.post(f"{pooled.url}/v1/agent/chat", json=body, headers=KEY)
    await cut.content.readany()
    cut.close()
    status, running = await chat(pooled, stream=True)
    assert (status, running["error"]["type"]) == (409, "conflict")
    session_id = running["error"]["details"]["session_id"]
    go_on.set()

    async def is_kept() -> bool:
        return (await chat(pooled, stream=True))[0] == 200

    await until(is_kept)
    _, text = await chat(pooled, stream=True)
    assert session_id in text
    assert len(pooled.agent.chats) == 1
    assert pooled.agent.disconnected == 0


async def test_another_request_with_the_same_key_is_a_conflict(pooled: Deployment) -> None:
    await chat(pooled)
    status, answer = await chat(pooled, "something else")
    assert (status, answer["error"]["details"]["field"]) == (409, "Idempotency-Key")
    status, _ = await pooled.call("POST", "/v1/agent/chat", {"user_id": "eve", "prompt": "hello"}, headers=KEY)
    assert status == 200  # a key belongs to its user


async def test_a_turn_that_may_have_acted_is_not_run_again_with_its_key(pooled: Deployment) -> None:
    """Whether the agent was lost during the turn or reported that a tool had run."""

    async def lost(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        request.transport.abort()  # type: ignore[union-attr]
        return web.Response()

    async def failed(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        error = ModelFailed("the Claude API answered 529", retryable=True).after_effects(body["session_id"], 1)
        return web.json_response(error.body("req-1").model_dump(exclude_none=True, mode="json"), status=502)

    agent = pooled.agent
    for number, answer in enumerate((lost, failed)):
        key = {"Idempotency-Key": f"acted-{number}"}
        agent.answer, before = answer, len(agent.chats)
        status, first = await chat(pooled, key=key)
        assert (status, first["error"]["retryable"], first["error"]["details"]["acted"]) == (502, False, True), first
        agent.answer = None
        status, again = await chat(pooled, key=key)
        assert (status, again["error"]["message"]) == (502, first["error"]["message"])
        assert len(agent.chats) == before + 1
    session_id = again["error"]["details"]["session_id"]
    status, answer = await chat(pooled, key={}, session_id=session_id)
    assert (status, answer["turn"]) == (200, 2), "the session of a first turn that acted stays"


async def test_a_failed_request_may_be_repeated(pooled: Deployment) -> None:
    async def fail(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        error = ModelFailed("the Claude API answered 529", retryable=True)
        return web.json_response(error.body("req-1").model_dump(exclude_none=True, mode="json"), status=502)

    pooled.agent.answer = fail
    assert (await chat(pooled))[0] == 502
    pooled.agent.answer = None
    assert (await chat(pooled))[0] == 200
    unknown = "00000000-0000-4000-8000-000000000000"
    assert (await chat(pooled, session_id=unknown, key={"Idempotency-Key": "x"}))[0] == 404


@pytest.mark.parametrize("key", ["", "a b", "k" * 256, "ü"])
async def test_an_invalid_key_is_rejected_by_name(pooled: Deployment, key: str) -> None:
    status, answer = await chat(pooled, key={"Idempotency-Key": key})
    assert status == 400
    assert "Idempotency-Key" in answer["error"]["message"]


async def test_spawns_with_one_key_create_one_agent(pooled: Deployment) -> None:
    body = {"user_id": "ada", "memory": 512, "anthropic_api_key": "sk-ant-0123456789"}
    answers = await asyncio.gather(
        *(pooled.call("POST", "/v1/agents/spawn", body, headers=KEY) for _ in range(5)), return_exceptions=False
    )
    assert {status for status, _ in answers} == {200}
    assert len({answer["agent_id"] for _, answer in answers}) == 1
    other_key = body | {"anthropic_api_key": "sk-ant-9876543210"}
    assert (await pooled.call("POST", "/v1/agents/spawn", other_key, headers=KEY))[0] == 409
    listed = (await pooled.call("GET", "/v1/agents/list", user_id="ada"))[1]
    assert listed["count"] == 1


async def test_after_a_crash_a_chat_is_not_run_again_and_a_spawn_continues(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with deployed(state, min_agents=1) as deployment:
        await deployment.warm(1)
        spawned = (await deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada"}, headers=KEY))[1]
        session_id = (await chat(deployment))[1]["session_id"]
        async with deployment.database.write() as connection:  # as left by a manager that was killed during a response
            await connection.execute(
                tables.idempotency.update().values(status=None, answer=None, holder="a dead manager")
            )
        status, lost = await chat(deployment)
        assert (status, lost["error"]["details"]["session_id"]) == (409, session_id)
        agent_of_pool = next(iter(deployment.agents.running.values()))
        assert len(agent_of_pool.chats) == 1
        status, again = await deployment.call("POST", "/v1/agents/spawn", {"user_id": "ada"}, headers=KEY)
        assert (status, again["agent_id"]) == (200, spawned["agent_id"])


async def test_keys_are_forgotten_after_a_day(pooled: Deployment) -> None:
    await chat(pooled)
    async with pooled.database.write() as connection:
        assert await idempotency.forget_before(connection, time.time() - RETAINED_SECONDS) == 0
        assert await idempotency.forget_before(connection, time.time() + 1) == 1


async def test_a_rate_limited_user_gets_retry_after(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1, rate_limit_per_minute=3) as pooled:
        await pooled.warm(1)
        found = await asyncio.gather(*(pooled.chat(f"{number}") for number in range(8)))
        assert sorted(status for status, _ in found) == [200] * 3 + [429] * 5
        status, _ = await pooled.call("POST", "/v1/agents/spawn", {"user_id": "ada"})
        assert status == 429
        async with pooled.http.post(f"{pooled.url}/v1/agent/chat", json={"user_id": "ada", "prompt": "x"}) as refused:
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            assert json.loads(await refused.text())["error"]["type"] == "rate_limited"
        assert (await pooled.call("POST", "/v1/agent/chat", {"user_id": "eve", "prompt": "x"}))[0] == 200
        sessions = (await pooled.call("GET", "/v1/agent/sessions", user_id="ada"))[1]
        assert sessions["count"] == 3  # a rejected request occupies no place


async def test_rate_limits_hold_across_managers(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with deployed(state, min_agents=1, rate_limit_per_minute=10) as pooled:
        await pooled.warm(1)
        settings = settings_for(state, min_agents=1, rate_limit_per_minute=10)
        async with managing(settings, pooled.backend) as second:

            async def one(number: int) -> int:
                url = pooled.url if number % 2 else second
                body = {"user_id": "ada", "prompt": "x"}
                async with pooled.http.post(f"{url}/v1/agent/chat", json=body) as answer:
                    return answer.status

            statuses = await asyncio.gather(*map(one, range(30)))
            assert sorted(statuses) == [200] * 10 + [429] * 20


async def test_zero_disables_the_rate_limit(tmp_path: Path) -> None:
    async with deployed(
        tmp_path / "state", min_agents=1, max_concurrent_requests=200, rate_limit_per_minute=0, rate_limit_per_hour=0
    ) as pooled:
        await pooled.warm(1)
        statuses = {(await pooled.chat("x"))[0] for _ in range(110)}
        assert statuses == {200}
