"""Files in and out of a workspace: through the real agent, with a real session, apart by the launcher or not."""

import asyncio
import contextlib
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web

from agent_sides import Agent, StandInGateway, launched, served_agent, stand_in_gateway, turn, until
from fixtures_simulator import RunningSimulator
from hypercore_agents.api.files import WRITE_LIMIT
from hypercore_agents.api.ids import new_session_id
from manager_sides import Deployment, StandInAgent, deployed


@pytest_asyncio.fixture
async def gateway(simulator: RunningSimulator) -> AsyncIterator[StandInGateway]:
    async with stand_in_gateway(simulator.url) as running:
        yield running


@pytest_asyncio.fixture(params=["shared", "own"])
async def agent(request: pytest.FixtureRequest, gateway: StandInGateway, tmp_path: Path) -> AsyncIterator[Agent]:
    if request.param == "own" and os.geteuid() != 0:
        pytest.skip("the launcher needs root")
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(launched(tmp_path / "launcher")) if request.param == "own" else None
        async with served_agent(gateway, tmp_path / "agent", launcher) as running:
            yield running


async def put(agent: Agent, session_id: str, path: str, body: bytes) -> int:
    url = f"{agent.url}/v1/agent/session/{session_id}/files/{path}"
    headers = {**agent.headers, "content-type": "application/octet-stream"}
    async with agent.client.put(url, data=io.BytesIO(body), headers=headers) as answer:
        return answer.status


async def get(agent: Agent, session_id: str, path: str) -> tuple[int, bytes]:
    url = f"{agent.url}/v1/agent/session/{session_id}/files/{path}"
    async with agent.client.get(url, headers=agent.headers) as answer:
        assert answer.status != 200 or answer.headers["content-disposition"] == "attachment"
        return answer.status, await answer.read()


async def test_files_go_in_are_listed_and_come_out_and_nothing_leads_outside(agent: Agent) -> None:
    session_id = new_session_id()
    links = "ln -s /etc/passwd secret; ln -s /etc out; mkfifo pipe; echo made > by-tool.txt"
    await agent.chat(turn(f'[[tool Bash {{"command": "{links}"}}]] [[say done]]', session_id, timeout=90))
    content = os.urandom(300_000)
    assert await put(agent, session_id, "a folder/data.bin", content) == 200
    assert await get(agent, session_id, "a folder/data.bin") == (200, content)
    assert await put(agent, session_id, "a folder/data.bin", b"new") == 200
    assert await get(agent, session_id, "a folder/data.bin") == (200, b"new")
    assert await get(agent, session_id, "by-tool.txt") == (200, b"made\n")

    status, listed = await agent.get(f"/v1/agent/session/{session_id}/files")
    assert status == 200
    kinds = {entry["path"]: (entry["type"], entry["size"]) for entry in listed["files"]}
    assert kinds["a folder/data.bin"] == ("file", 3)
    assert kinds["a folder"][0] == "folder"
    assert kinds["secret"][0] == kinds["pipe"][0] == "other"

    for path in ("secret", "out/passwd", "out/new.txt"):
        assert (await get(agent, session_id, path))[0] == 403, path
        assert await put(agent, session_id, path, b"x") == 403, path
    assert (await get(agent, session_id, "pipe"))[0] == 400
    assert (await get(agent, session_id, "a folder"))[0] == 400
    assert await put(agent, session_id, "a folder", b"x") == 400
    assert (await get(agent, session_id, "none.txt"))[0] == 404
    assert (await get(agent, new_session_id(), "by-tool.txt"))[0] == 404
    assert await put(agent, session_id, "big.bin", b"x" * (WRITE_LIMIT + 1)) == 413
    assert (await get(agent, session_id, "big.bin"))[0] == 404, "nothing of it stays"

    read = await agent.chat(turn('[[tool Bash {"command": "cat a*/data.bin"}]] [[say ok]]', session_id, number=2))
    assert read["status"] == "completed"


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state") as deployment:
        yield deployment


async def test_a_session_that_ends_while_a_file_comes_leaves_nothing_here(agent: Agent) -> None:
    session_id = new_session_id()
    await agent.chat(turn("hello", session_id, timeout=90))
    session = agent.server.enrolled().get(session_id)
    begun, proceed = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"secret"
        begun.set()
        await proceed.wait()
        yield b"secret"

    async def send() -> int:
        url = f"{agent.url}/v1/agent/session/{session_id}/files/late.txt"
        async with agent.client.put(url, data=slowly(), headers=agent.headers) as answer:
            return answer.status

    sending = asyncio.create_task(send())
    await begun.wait()
    await until(lambda: session.archive.changed)
    assert (await agent.delete(f"/v1/agent/session/{session_id}"))[0] == 200
    proceed.set()
    assert await sending == 503, "whoever asks again is told that there is no such session"
    assert not await session.keep_files()
    for state in (agent.state, agent.state.parent / "launcher"):
        assert not list(state.glob(f"**/{session_id}*"))


async def test_the_manager_passes_files_on_to_the_sessions_agent_and_to_nobody_else(site: Deployment) -> None:
    kept: dict[str, bytes] = {}

    async def file(request: web.Request) -> web.Response:
        if request.method == "PUT":
            kept[request.match_info["path"]] = await request.read()
            return web.json_response({"session_id": request.match_info["id"], "path": "p", "size": 1})
        return web.Response(body=kept[request.match_info["path"]], content_type="application/octet-stream")

    application = StandInAgent.application

    def with_files(agent: StandInAgent) -> web.Application:
        app = application(agent)
        app.router.add_route("*", "/v1/agent/session/{id}/files/{path:.+}", file)
        return app

    site.agents.prepare = lambda agent: setattr(agent, "application", lambda: with_files(agent))
    _, agent = await site.call("POST", "/v1/agents/spawn", {"user_id": "ada"})
    _, answer = await site.call(
        "POST", f"/agents/{agent['agent_id']}/v1/agent/chat", {"user_id": "ada", "prompt": "hello"}
    )
    url = f"{site.url}/v1/agent/session/{answer['session_id']}/files/a%20folder/data.bin"
    octets = {"content-type": "application/octet-stream"}
    async with site.http.put(url, data=b"\x00\xff", headers=octets) as put:
        assert put.status == 200, await put.text()
    assert kept == {"a folder/data.bin": b"\x00\xff"}
    async with site.http.get(url) as got:
        assert (got.status, await got.read()) == (200, b"\x00\xff")
    async with site.http.get(f"{url}?user_id=bob") as foreign:
        assert foreign.status == 404
    async with site.http.put(url, data=b"{}", headers={"content-type": "text/plain"}) as undeclared:
        assert undeclared.status == 400
    async with site.http.put(url, data=b"x", headers={**octets, "origin": "http://evil.example"}) as page:
        assert page.status == 403
