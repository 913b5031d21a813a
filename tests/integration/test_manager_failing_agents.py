"""A turn that its agent cannot begin runs on another agent within the same request."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hypercore_agents.api.errors import AgentUnreachable, HypercoreError
from hypercore_agents.api.events import encode
from support.manager_server import Deployment, StandInAgent, completed, deployed, frame
from support.waiting import until


def start_failed() -> HypercoreError:
    return AgentUnreachable("the Claude CLI ended at its start").for_another_agent()


Failure = Callable[[web.Request, dict[str, Any]], Any]


def refusing(error: Callable[[], HypercoreError] = start_failed, told: asyncio.Event | None = None) -> Failure:
    """Return the response of an agent whose start fails: the error as JSON, or at the end of a stream that has begun.

    The stream ends once `told` is set, when the client has received its beginning.
    """

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        failure = error()
        if not body.get("stream"):
            said = failure.body("req_1").model_dump_json(exclude_none=True)
            return web.Response(text=said, status=failure.status, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(session_event("failing", body))
        if told is not None:
            await told.wait()
        await response.write(encode(failure.body("req_1"), "1.2"))
        return response

    return answer


def session_event(agent_id: str, body: dict[str, Any]) -> bytes:
    told = {"session_id": body["placement"]["session_id"], "agent_id": agent_id, "turn": body["placement"]["turn"]}
    return frame("session", {**told, "tools": False, "notices": []})


def succeeding(agent: StandInAgent) -> Failure:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if not body.get("stream"):
            return web.json_response(completed(agent, body))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(session_event(agent.agent_id, body) + frame("delta", {"text": "hi"}))
        await response.write(frame("result", completed(agent, body)))
        return response

    return answer


@contextlib.asynccontextmanager
async def pool_of(folder: Path, size: int) -> AsyncIterator[tuple[Deployment, list[StandInAgent]]]:
    """A pool, and its agents in the order in which new sessions are placed on them."""
    async with deployed(folder / "state", min_agents=size) as deployment:
        await deployment.warm(size)
        order = []
        for _ in range(size):
            _, answer = await deployment.chat()
            order.append(deployment.agents.running[answer["agent_id"]])
        for agent in order:
            agent.answer = succeeding(agent)
            agent.chats.clear()
        yield deployment, order


async def events_of(deployment: Deployment, told: asyncio.Event | None = None) -> list[tuple[str, Any]]:
    """Return the events of a streamed turn; set `told` when the first one has arrived."""
    asked = {"user_id": "ada", "prompt": "hello", "stream": True}
    async with deployment.http.post(f"{deployment.url}/v1/agent/chat", json=asked) as answer:
        assert answer.status == 200
        text = ""
        async for chunk in answer.content.iter_any():
            text += chunk.decode()
            if told is not None:
                told.set()
    frames = [dict(line.split(": ", 1) for line in said.splitlines()) for said in text.split("\n\n") if said]
    return [(said["event"], json.loads(said["data"])) for said in frames]


async def test_a_turn_whose_start_failed_runs_on_another_agent(tmp_path: Path) -> None:
    async with pool_of(tmp_path, 2) as (deployment, (failing, well)):
        failing.answer = refusing()
        status, answer = await deployment.chat()
        assert status == 200
        assert answer["agent_id"] == well.agent_id
        (tried,), (done,) = failing.chats, well.chats
        assert done["placement"]["session_id"] == tried["placement"]["session_id"] == answer["session_id"]
        assert [chat["placement"]["turn"] for chat in (tried, done)] == [1, 1]
        assert [chat["placement"]["generation"] for chat in (tried, done)] == [1, 2]
        await until(lambda: failing.deleted == [answer["session_id"]])
        # The session is placed where its turn ran, and its next turn runs there.
        status, again = await deployment.chat(session_id=answer["session_id"])
        assert (status, again["agent_id"], again["turn"]) == (200, well.agent_id, 2)


async def test_a_moved_turn_continues_in_the_same_stream(tmp_path: Path) -> None:
    async with pool_of(tmp_path, 2) as (deployment, (failing, well)):
        told = asyncio.Event()
        failing.answer = refusing(told=told)
        events = await events_of(deployment, told)
        assert [name for name, _ in events] == ["session", "session", "delta", "result"]
        assert [data["agent_id"] for name, data in events if name == "session"] == ["failing", well.agent_id]
        assert len({data["session_id"] for name, data in events if name != "delta"}) == 1
        status, _ = await deployment.chat(session_id=events[-1][1]["session_id"])
        assert status == 200


async def test_a_repeated_request_gets_the_response_of_a_moved_turn(tmp_path: Path) -> None:
    async with pool_of(tmp_path, 2) as (deployment, (failing, well)):
        failing.answer = refusing()
        body = {"user_id": "ada", "prompt": "hello"}
        answers = [
            await deployment.call("POST", "/v1/agent/chat", body, headers={"Idempotency-Key": "one"}) for _ in range(2)
        ]
        assert answers[0] == answers[1]
        assert answers[0][0] == 200
        assert len(well.chats) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_turn_is_placed_at_most_three_times(tmp_path: Path, stream: bool) -> None:
    async with pool_of(tmp_path, 4) as (deployment, order):
        for agent in order:
            agent.answer = refusing()
        if stream:
            events = await events_of(deployment)
            assert [name for name, _ in events if name != "session"] == ["error"]
            error = events[-1][1]["error"]
        else:
            status, answer = await deployment.chat()
            assert status == 502
            error = answer["error"]
        assert (error["type"], error["retryable"]) == ("agent_unreachable", True)
        assert error["details"]["acted"] is False
        assert [len(agent.chats) for agent in order] == [1, 1, 1, 0]


@pytest.mark.parametrize("stream", [False, True])
async def test_without_another_agent_the_error_is_returned(tmp_path: Path, stream: bool) -> None:
    async with pool_of(tmp_path, 1) as (deployment, (failing,)):
        failing.answer = refusing()
        if stream:
            told = asyncio.Event()
            failing.answer = refusing(told=told)
            assert [name for name, _ in await events_of(deployment, told)] == ["session", "error"]
        else:
            status, answer = await deployment.chat()
            assert (status, answer["error"]["message"]) == (502, "the Claude CLI ended at its start")
            await until(lambda: len(failing.deleted) == 1)
        assert len(failing.chats) == 1


async def test_a_turn_that_acted_or_names_its_agent_does_not_move(tmp_path: Path) -> None:
    async with pool_of(tmp_path, 2) as (deployment, (failing, well)):
        for error in (
            lambda: AgentUnreachable("the Claude CLI died during a turn"),
            lambda: start_failed().after_effects(None, 1),
        ):
            failing.answer = refusing(error)
            status, _ = await deployment.chat()
            assert status == 502
        failing.answer = refusing()
        path = f"/agents/{failing.agent_id}/v1/agent/chat"
        status, _ = await deployment.call("POST", path, {"user_id": "ada", "prompt": "hello"})
        assert status == 502
        assert well.chats == []


async def test_an_error_inside_a_tools_input_does_not_move_the_turn(tmp_path: Path) -> None:
    async with pool_of(tmp_path, 2) as (deployment, (first, second)):

        async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            tool = {"tool_use_id": "1", "name": "Write", "input": start_failed().body("x").model_dump()}
            said = json.dumps(tool, separators=(",", ":"))
            await response.write(session_event(first.agent_id, body) + f"event: tool_use\ndata: {said}\n\n".encode())
            await response.write(frame("result", completed(first, body)))
            return response

        first.answer = answer
        assert [name for name, _ in await events_of(deployment)] == ["session", "tool_use", "result"]
        assert second.chats == []


async def test_a_disconnect_between_two_agents_ends_the_turn(tmp_path: Path) -> None:
    async with pool_of(tmp_path, 2) as (deployment, (failing, well)):
        failing.answer = refusing()
        held = asyncio.Event()

        async def hang(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            held.set()
            await asyncio.Event().wait()
            raise AssertionError

        well.answer = hang
        async with aiohttp.ClientSession() as leaving:
            body = {"user_id": "ada", "prompt": "hello", "stream": True, "on_disconnect": "interrupt"}
            async with leaving.post(f"{deployment.url}/v1/agent/chat", json=body):
                await asyncio.wait_for(held.wait(), 20)
        await until(lambda: well.disconnected == 1)
        well.answer = succeeding(well)
        session_id = well.chats[-1]["placement"]["session_id"]

        async def is_free() -> bool:
            status, _ = await deployment.chat(session_id=session_id)
            return status == 200

        await until(is_free)
