"""kill -9 of manager, gateway and agent at each step of spawn, chat and delete, on the whole platform.

Real processes: `up --demo` with two manager workers, the process backend, the Agent SDK's CLI, the simulator. Within
`SETTLED_SECONDS` after each kill, desired state, store and processes agree, and the platform accepts turns. Once the
agents are deleted, processes, listening and connected sockets, descriptors and files are the same as before. Finally
`up` itself is killed in the middle of a stream.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from support.platform_parts import Counts, Platform, Up, up
from support.waiting import until

SETTLED_SECONDS = 60.0
KILLS = 3
"""Kills of each victim: during a spawn, during turns, during a deletion."""
VICTIMS = ("worker", "gateway", "agent", "manager")
"""The killed processes: `worker` is every manager process except the parent, `manager` is the parent."""
LONG = "[[ttft 0.05]] [[rate 20]] [[tokens 120]]"
pytestmark = [pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with up(tmp_path_factory.mktemp("kills")) as started:
        yield started


@pytest_asyncio.fixture
async def platform(running: Up) -> AsyncIterator[Platform]:
    async with client_of(running) as found:
        yield found


@contextlib.asynccontextmanager
async def client_of(running: Up) -> AsyncIterator[Platform]:
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=60), connector=aiohttp.TCPConnector(force_close=True)
    ) as http:
        found = Platform(running, http)
        await until(found.agrees, seconds=120)
        await until(found.takes_turns, seconds=60)
        yield found


@pytest.mark.parametrize("victim", VICTIMS)
async def test_state_agrees_and_nothing_leaks_after_kills_at_each_step(platform: Platform, victim: str) -> None:
    before = await platform.settled()
    # Two spawns with one kill: one agent is starting, the other exists only as a row in the store.
    starting = await platform.spawn()
    await until(lambda: platform.of_agent(starting), seconds=SETTLED_SECONDS)
    asked = await platform.spawn()
    platform.kill(victim, starting)
    for agent_id in (starting, asked):
        await until(lambda agent_id=agent_id: platform.is_decided(agent_id), seconds=SETTLED_SECONDS)  # type: ignore[misc]
    if victim in ("worker", "manager"):  # successors finish spawns of killed workers
        assert [await platform.status(agent_id) for agent_id in (starting, asked)] == ["running"] * 2, platform.up.log()
    await until(platform.agrees, seconds=SETTLED_SECONDS)

    agents = {starting, asked}
    await turns_cut_short(platform, await running_agent(platform, agents), victim)
    await until(platform.agrees, seconds=SETTLED_SECONDS)

    agent_id = await running_agent(platform, agents)
    deleting = asyncio.create_task(platform.call("DELETE", "/v1/agents/delete", agent_id=agent_id))

    async def is_wanted_stopped() -> bool:
        return deleting.done() or await platform.status(agent_id) in ("draining", "stopped")

    await until(is_wanted_stopped, seconds=SETTLED_SECONDS)
    platform.kill(victim, agent_id)
    await deleting
    await until(platform.agrees, seconds=SETTLED_SECONDS)

    async def all_are_deleted() -> bool:
        for one in agents:
            await platform.call("DELETE", "/v1/agents/delete", agent_id=one)
        return all([await platform.status(one) in ("stopped", "failed") for one in agents])

    await until(all_are_deleted, seconds=SETTLED_SECONDS)
    await until(platform.takes_turns, seconds=SETTLED_SECONDS)
    await until(platform.agrees, seconds=SETTLED_SECONDS)
    with contextlib.suppress(AssertionError):  # idle kept-alive connections may stay open for 75 s
        await until(lambda: not leaked(platform, before), seconds=2 * SETTLED_SECONDS)
    assert leaked(platform, before) == {}


def leaked(platform: Platform, before: Counts) -> dict[Any, Any]:
    """Return what there is more of than before. A pool may hold more connections, but fewer than one for each kill."""
    found = platform.counts().more_than(before)
    return {
        what: change
        for what, change in found.items()
        if not (isinstance(what, tuple) and what[1] == "connected" and change[1] - change[0] < KILLS)
    }


async def running_agent(platform: Platform, agents: set[str]) -> str:
    """Return a running agent of this set, or spawn one and add it."""
    for agent_id in agents:
        if await platform.status(agent_id) == "running":
            return agent_id
    agent_id = await platform.spawn()
    agents.add(agent_id)
    await until(lambda: platform.is_decided(agent_id), seconds=SETTLED_SECONDS)
    assert await platform.status(agent_id) == "running"
    return agent_id


async def turns_cut_short(platform: Platform, agent_id: str, victim: str) -> None:
    """Kill while the model answers two turns, one as a stream: each client gets an error or the answer."""
    path = f"/agents/{agent_id}/v1/agent/chat"
    asked = asyncio.create_task(platform.call("POST", path, {"user_id": "ada", "prompt": LONG}))

    async def runs() -> bool:
        status, found = await platform.call("GET", "/v1/agent/sessions", user_id="ada")
        return status == 200 and any(one["running"] and one["agent_id"] == agent_id for one in found["sessions"])

    await until(runs, seconds=SETTLED_SECONDS)
    seen = await cut_stream(platform, path, {"user_id": "ada"}, lambda: platform.kill(victim, agent_id))
    if victim in ("gateway", "agent"):
        assert seen[-1] in ("result", "error"), seen
    status, answer = await asked
    assert status in (0, 200) or answer["error"]["type"], answer


async def cut_stream(platform: Platform, path: str, body: dict[str, Any], kill: Any) -> list[str]:
    """Stream a turn and kill at its first delta; return the names of the events."""
    seen: list[str] = []
    killed = False
    with contextlib.suppress(aiohttp.ClientError):
        async with platform.http.post(platform.url + path, json={**body, "prompt": LONG, "stream": True}) as answer:
            assert answer.status == 200
            async for line in answer.content:
                if line.startswith(b"event: "):
                    seen.append(line[7:].strip().decode())
                if line.startswith(b"data: "):
                    json.loads(line[6:])
                if seen and seen[-1] == "delta" and not killed:
                    kill()
                    killed = True
    assert killed, seen
    return seen


async def test_killing_up_ends_its_processes_and_a_new_up_continues(running: Up) -> None:
    async with client_of(running) as platform:
        body = {"user_id": "ada", "prompt": "remember the word cobalt"}
        status, first = await platform.call("POST", "/v1/agent/chat", body)
        assert status == 200, first
        session = {"user_id": "ada", "session_id": first["session_id"]}
        await cut_stream(platform, "/v1/agent/chat", session, running.process.kill)
        running.process.wait(30)
        with contextlib.suppress(AssertionError):
            await until(lambda: not platform.processes(), seconds=2 * SETTLED_SECONDS)
        assert platform.processes() == {}
    for address in running.addresses.values():
        host, _, port = address.partition(":")
        with socket.create_server((host, int(port))):
            pass  # it is free again
    running.again()
    async with client_of(running) as platform:
        status, answer = await platform.call("POST", "/v1/agent/chat", {**session, "prompt": "[[recall 1]]"})
        assert status == 200, answer
        assert "cobalt" in answer["content"]
