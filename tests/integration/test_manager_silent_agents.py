"""Clients of an agent that stops during a turn get a notice, keep-alives, and an error as soon as it is lost."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hypercore_agents.api.internal import Heartbeat
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.store import heartbeats
from support.manager_server import Deployment, StandInAgent, aiohttp_served, completed, deployed, frame
from support.waiting import until

BEAT = Heartbeat(ready=True, sessions=0, live=0, running=0, waiting=0, memory_mb=1, memory_limit_mb=2)


@contextlib.asynccontextmanager
async def two_agents(folder: Path) -> AsyncIterator[tuple[Any, Any, Any]]:
    """A manager, an agent whose heartbeats stop when it is added to a set, and that set."""

    async def ready(_: web.Request) -> web.Response:
        return web.json_response({})

    gateway = web.Application()
    gateway.router.add_get("/ready", ready)
    async with (
        aiohttp_served(gateway) as url,
        # A lost agent takes this long to stop; its clients are informed before.
        deployed(folder / "state", min_agents=2, health_check_interval=2, gateway_url=url) as deployment,
    ):
        silent: set[str] = set()

        async def beat() -> None:
            for agent_id in set(deployment.agents.running) - silent:
                async with deployment.database.write() as connection:
                    await heartbeats.put_heartbeat(connection, agent_id, BEAT, now=time.time())

        hearts = Tasks("test")
        hearts.repeat("beat", beat, every=0.1)
        await deployment.warm(2)
        _, answer = await deployment.chat()
        yield deployment, deployment.agents.running[answer["agent_id"]], silent
        await hearts.close()


def stopping(agent: StandInAgent, goes_on: asyncio.Event) -> None:
    """Have the agent stop after the first event of a stream and half of the next one."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if not body.get("stream"):
            await goes_on.wait()
            return web.json_response(completed(agent, body))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        whole = frame("delta", {"text": "hi"})
        await response.write(frame("session", {"session_id": body["placement"]["session_id"]}) + whole[:10])
        await goes_on.wait()
        await response.write(whole[10:] + frame("result", completed(agent, body)))
        return response

    agent.answer = answer


async def ask(deployment: Deployment, heard: list[bytes], **body: Any) -> int:
    """Send a streamed chat; record the pieces that arrive."""
    asked = {"user_id": "ada", "prompt": "hello", "stream": True, **body}
    async with deployment.http.post(f"{deployment.url}/v1/agent/chat", json=asked) as answer:
        async for chunk in answer.content.iter_any():
            heard.append(chunk)
        return answer.status


def names(heard: list[bytes]) -> list[str]:
    """Return the events' names; `keepalive` for a comment."""
    parts = b"".join(heard).decode().split("\n\n")
    return [
        "keepalive" if part.startswith(":") else part.splitlines()[0].removeprefix("event: ") for part in parts if part
    ]


async def first_on(deployment: Deployment, agent: StandInAgent) -> None:
    """Occupy the other agent's place, so that the next new session is placed on this agent."""
    while True:
        _, answer = await deployment.chat()
        if answer["agent_id"] != agent.agent_id:
            return


async def test_a_stream_gets_a_notice_while_heartbeats_are_missing(tmp_path: Path) -> None:
    async with two_agents(tmp_path) as (deployment, agent, silent):
        await first_on(deployment, agent)
        goes_on = asyncio.Event()
        stopping(agent, goes_on)
        silent.add(agent.agent_id)
        heard: list[bytes] = []
        asking = asyncio.create_task(ask(deployment, heard))
        # The agent's server still responds, and it could be declared lost only if the gateway were ready.
        await until(lambda: "notice" in names(heard), seconds=20)
        silent.clear()
        goes_on.set()
        assert await asking == 200
        told = [name for name in names(heard) if name != "keepalive"]
        assert told == ["session", "notice", "delta", "result"]
        (notice,) = [part for part in b"".join(heard).decode().split("\n\n") if "event: notice" in part]
        assert "has sent no heartbeat for" in json.loads(notice.split("data: ")[1])["text"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_lost_agents_turn_ends_before_its_sandbox_is_gone(
    tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_agents(tmp_path) as (deployment, agent, silent):
        await first_on(deployment, agent)
        stopping(agent, asyncio.Event())
        held = asyncio.Event()
        stop = deployment.backend.stop

        async def slow_stop(agent_id: str, *, grace: float = 10.0) -> None:
            await held.wait()
            await stop(agent_id, grace=grace)

        monkeypatch.setattr(deployment.backend, "stop", slow_stop)
        agent.hangs = True
        silent.add(agent.agent_id)
        heard: list[bytes] = []
        if stream:
            assert await asyncio.wait_for(ask(deployment, heard), 25) == 200
            assert names(heard)[0] == "session"
            assert names(heard)[-1] == "error"
            assert "notice" in names(heard)
            error = json.loads(b"".join(heard).decode().rsplit("data: ", 1)[1])["error"]
            assert error["details"]["session_id"]
        else:
            status, answer = await asyncio.wait_for(deployment.chat(), 25)
            assert status == 502
            error = answer["error"]
        assert agent.agent_id in deployment.agents.running, "the client did not wait until the sandbox stopped"
        assert error["type"] == "agent_unreachable"
        assert "lost during the turn: the agent sent no heartbeat for" in error["message"]
        assert (error["retryable"], error["details"]["acted"]) == (False, True)
        held.set()
        await until(lambda: agent.agent_id not in deployment.agents.running, seconds=20)


async def test_an_idle_stream_of_an_agent_with_heartbeats_gets_no_notice(tmp_path: Path) -> None:
    async with two_agents(tmp_path) as (deployment, agent, silent):
        await first_on(deployment, agent)
        goes_on = asyncio.Event()
        stopping(agent, goes_on)
        heard: list[bytes] = []
        asking = asyncio.create_task(ask(deployment, heard))
        await until(lambda: len(heard) > 0)
        # Another agent's missing heartbeats do not affect this stream; they are detected within this time.
        (other,) = set(deployment.agents.running) - {agent.agent_id}
        deployment.agents.running[other].hangs = True
        silent.add(other)
        await until(lambda: other not in deployment.agents.running, seconds=20)
        goes_on.set()
        assert await asking == 200
        assert names(heard) == ["session", "delta", "result"]
