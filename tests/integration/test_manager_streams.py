"""Clients that lose their stream, through the manager and a real agent."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hypercore_agents.manager.sessions import follow
from support.manager_server import StandInAgent, completed, deployed
from support.waiting import until


async def test_only_its_user_can_follow_a_sessions_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "STREAM_SECONDS", 1.0)
    async with deployed(tmp_path / "state", min_agents=1) as deployment:
        await deployment.warm(1)
        _, first = await deployment.chat()
        path = f"/v1/agent/session/{first['session_id']}/events/stream"
        status, text = await deployment.call("GET", path, headers={"Last-Event-ID": "1.7"})
        assert (status, "after 1.7" in text) == (200, True)
        assert (await deployment.call("GET", path, user_id="eve"))[0] == 404
        agent = deployment.agent
        assert (await deployment.call("GET", f"/agents/{agent.agent_id}{path}"))[0] == 200


async def test_a_turn_continues_after_a_disconnect_only_if_requested(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1) as deployment:
        await deployment.warm(1)
        agent = deployment.agent
        proceed, ended = asyncio.Event(), asyncio.Event()

        async def slow(_: web.Request, body: dict[str, Any]) -> web.Response:
            await proceed.wait()
            ended.set()
            return web.json_response(completed(agent, body))

        agent.answer = slow
        for number, choice in enumerate(("continue", "interrupt"), start=1):
            async with aiohttp.ClientSession() as leaving:
                body = {"user_id": "ada", "prompt": "hello", "on_disconnect": choice}
                asking = asyncio.create_task(leaving.post(f"{deployment.url}/v1/agent/chat", json=body))
                await until(partial(_heard, agent, number))
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: agent.disconnected > 0)
        proceed.set()
        await asyncio.wait_for(ended.wait(), 30)
        assert agent.disconnected == 1, "the first client's turn continues; its disconnect was detected first"


async def test_a_disconnect_before_the_first_event_ends_the_session(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1) as deployment:
        await deployment.warm(1)
        agent = deployment.agent

        async def silent(_: web.Request, body: dict[str, Any]) -> web.Response:
            await asyncio.Event().wait()
            return web.json_response(completed(agent, body))

        agent.answer = silent
        async with aiohttp.ClientSession() as leaving:
            body = {"user_id": "ada", "prompt": "hello", "stream": True, "on_disconnect": "continue"}
            asking = asyncio.create_task(leaving.post(f"{deployment.url}/v1/agent/chat", json=body))
            await until(partial(_heard, agent, 1))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: agent.disconnected == 1)
        await until(lambda: agent.deleted == [agent.chats[0]["placement"]["session_id"]])


def _heard(agent: StandInAgent, chats: int) -> bool:
    return len(agent.chats) == chats
