"""Files of a workspace over HTTP, with the real agent and a real session, with and without the launcher."""

import asyncio
import base64
import contextlib
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from yarl import URL

from hypercore_agents.api.files import WRITE_LIMIT
from hypercore_agents.api.ids import new_session_id
from support.agent_server import Agent, StandInGateway, launched, served_agent, tool, turn
from support.manager_server import Deployment, StandInAgent, deployed
from support.waiting import until


@pytest_asyncio.fixture(params=["shared", pytest.param("own", marks=pytest.mark.root)])
async def agent(request: pytest.FixtureRequest, gateway: StandInGateway, tmp_path: Path) -> AsyncIterator[Agent]:
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(launched(tmp_path / "launcher")) if request.param == "own" else None
        async with served_agent(gateway, tmp_path / "agent", launcher) as running:
            yield running


def url_of(agent: Agent, session_id: str, path: str | bytes) -> URL:
    return URL(f"{agent.url}/v1/agent/session/{session_id}/files/{quote(path)}", encoded=True)


async def put(agent: Agent, session_id: str, path: str, body: bytes) -> int:
    return (await put_with_answer(agent, session_id, path, body))[0]


async def put_with_answer(agent: Agent, session_id: str, path: str, body: bytes) -> tuple[int, Any]:
    url = url_of(agent, session_id, path)
    async with agent.client.put(url, data=io.BytesIO(body), headers=agent.headers) as answer:
        return answer.status, await answer.json()


async def get(agent: Agent, session_id: str, path: str | bytes) -> tuple[int, bytes]:
    async with agent.client.get(url_of(agent, session_id, path), headers=agent.headers) as answer:
        assert answer.status != 200 or answer.headers["content-disposition"] == "attachment"
        return answer.status, await answer.read()


async def delete(agent: Agent, session_id: str, path: str | bytes) -> tuple[int, Any]:
    async with agent.client.delete(url_of(agent, session_id, path), headers=agent.headers) as answer:
        return answer.status, await answer.json()


async def listed(agent: Agent, session_id: str, **query: Any) -> dict[str, Any]:
    status, page = await agent.get(f"/v1/agent/session/{session_id}/files?{urlencode(query)}")
    assert status == 200, page
    assert isinstance(page, dict)
    return page


async def test_files_are_written_listed_and_read_only_in_the_workspace(agent: Agent) -> None:
    session_id = new_session_id()
    links = "ln -s /etc/passwd secret; ln -s /etc out; mkfifo pipe; echo made > by-tool.txt"
    await agent.chat(turn(f'[[tool Bash {{"command": "{links}"}}]] [[say done]]', session_id, timeout=90))
    content = os.urandom(300_000)
    assert await put(agent, session_id, "a folder/data.bin", content) == 200
    assert await get(agent, session_id, "a folder/data.bin") == (200, content)
    assert await put(agent, session_id, "a folder/data.bin", b"new") == 200
    assert await get(agent, session_id, "a folder/data.bin") == (200, b"new")
    assert await get(agent, session_id, "by-tool.txt") == (200, b"made\n")

    page = await listed(agent, session_id)
    kinds = {entry["path"]: (entry["type"], entry["size"]) for entry in page["files"]}
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
    assert (await get(agent, session_id, "big.bin"))[0] == 404, "nothing of it is stored"

    read = await agent.chat(turn('[[tool Bash {"command": "cat a*/data.bin"}]] [[say ok]]', session_id, number=2))
    assert read["status"] == "completed"


_SHOWN_AS_BYTES = "\uef80\ufffd".encode()
_ODD_NAMES = [
    b"plain", b"line\nfeed", b"ends with a line feed\n", b"tab\tbed", b"back\\slash", b"a b?c#d%20e", b"-n",
    b"\xff\x81\x88", b"caf\xe9", "caf\u00e9/\u732b".encode(), _SHOWN_AS_BYTES, b"\x7f\x01", b"'quote\"d'", b"*",
    b"x" * 255,
]  # fmt: skip


async def test_listed_paths_address_files_of_any_name(agent: Agent) -> None:
    session_id = new_session_id()
    script = f"""
import os
for number, name in enumerate({_ODD_NAMES!r}):
    if os.path.dirname(name):
        os.makedirs(os.path.dirname(name))
    open(name, "w").write(str(number))
"""
    encoded = base64.b64encode(script.encode()).decode()
    await agent.chat(turn(tool("Bash", command=f"echo {encoded} | base64 -d | python3 -"), session_id, timeout=90))
    page = await listed(agent, session_id)
    paths = [entry["path"] for entry in page["files"] if entry["type"] == "file"]
    assert len(paths) == len(_ODD_NAMES)
    contents = [await get(agent, session_id, path) for path in paths]
    assert sorted(contents) == sorted((200, str(number).encode()) for number in range(len(_ODD_NAMES)))
    for number, name in enumerate(_ODD_NAMES):  # also by the name's bytes, unless they are the text of another path
        if name == _SHOWN_AS_BYTES:
            continue
        assert await get(agent, session_id, name) == (200, str(number).encode()), name
    for path in paths:
        assert await put(agent, session_id, path, b"over it") == 200, path
        assert await get(agent, session_id, path) == (200, b"over it"), path
        status, answer = await delete(agent, session_id, path)
        assert (status, answer["path"], answer["workspace_durable"]) == (200, path, True)
        assert (await delete(agent, session_id, path))[0] == 404
    assert [entry["type"] for entry in (await listed(agent, session_id))["files"]] == ["folder"]


async def test_conflicting_paths_are_client_errors(agent: Agent) -> None:
    session_id = new_session_id()
    script = (
        "mkdir -p full/of empty; echo x > a.txt; ln -s a.txt link; ln -s /etc out; echo k > closed; chmod 000 closed"
    )
    await agent.chat(turn(tool("Bash", command=script), session_id, timeout=90))
    for path, status, words in (
        ("a.txt/b", 400, "is a file"),
        ("a.txt/b/c", 400, "is a file"),
        ("full", 400, "is a folder"),
        ("y" * 256, 400, "255 bytes"),
        ("d/" * 201 + "f", 400, "200 nested folders"),
        ("d/../e", 400, ""),
        ("out/x", 403, "outside the workspace"),
    ):
        got, answer = await put_with_answer(agent, session_id, path, b"x")
        assert (got, answer["error"]["retryable"]) == (status, False), answer
        assert words in answer["error"]["message"]
    assert await put(agent, session_id, "d/" * 200 + "f", b"deep") == 200
    assert await get(agent, session_id, "d/" * 200 + "f") == (200, b"deep")
    assert (await get(agent, session_id, "a.txt/b"))[0] == 404
    if agent.server.launcher is not None:  # without the launcher the session is root, which reads everything
        assert (await get(agent, session_id, "closed"))[0] == 403
    for path, status, words in (
        ("full", 409, "is not empty"),
        ("none", 404, "no file"),
        ("a.txt/b", 404, "no file"),
        ("out/passwd", 403, "outside the workspace"),
    ):
        got, answer = await delete(agent, session_id, path)
        assert (got, answer["error"]["retryable"]) == (status, False), answer
        assert words in answer["error"]["message"]
    for path in ("empty", "link", "out", "full/of", "full"):
        assert (await delete(agent, session_id, path))[0] == 200, path
    left = {entry["path"] for entry in (await listed(agent, session_id))["files"]}
    assert {"a.txt", "closed"} <= left
    assert not {"empty", "link", "out", "full"} & left
    answer = await agent.chat(turn("still there?", session_id, number=2, timeout=90))
    assert answer["status"] == "completed", "the disk scan accepts every file that the route accepted"


async def test_a_list_is_paged_in_path_order(agent: Agent) -> None:
    session_id = new_session_id()
    script = "mkdir -p a/b 'a!' c; touch a/b/1 a/b/2 a/z 'a!/q' c/d; touch c/$(seq -s ' c/' 1 30)"
    await agent.chat(turn(tool("Bash", command=script), session_id, timeout=90))
    whole = await listed(agent, session_id)
    assert (whole["next"], whole["truncated"]) == (None, False)
    paths = [entry["path"] for entry in whole["files"]]
    assert paths[:8] == ["a", "a/b", "a/b/1", "a/b/2", "a/z", "a!", "a!/q", "c"]
    assert len(paths) == 8 + 31
    for limit in (1, 2, 7, len(paths)):
        page = await listed(agent, session_id, limit=limit)
        seen = [entry["path"] for entry in page["files"]]
        while page["next"] is not None:
            assert (page["truncated"], page["count"]) == (True, limit)
            page = await listed(agent, session_id, limit=limit, after=page["next"])
            seen += [entry["path"] for entry in page["files"]]
        assert seen == paths
    await delete(agent, session_id, "a/b/1")
    page = await listed(agent, session_id, after="a/b/1", limit=1)
    assert [entry["path"] for entry in page["files"]] == ["a/b/2"], "a cursor stays valid after its file's deletion"


async def test_a_broken_upload_leaves_the_old_file(agent: Agent) -> None:
    session_id = new_session_id()
    await agent.chat(turn("hello", session_id, timeout=90))
    assert await put(agent, session_id, "a.txt", b"old") == 200

    async def broken_body() -> AsyncIterator[bytes]:
        yield b"n" * 300_000
        raise ConnectionError

    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        async with agent.client.put(
            url_of(agent, session_id, "a.txt"), data=broken_body(), headers=agent.headers
        ) as answer:
            assert answer.status != 200
    await until(lambda: not agent.server.files()._transfers)
    assert await get(agent, session_id, "a.txt") == (200, b"old")
    assert [entry["path"] for entry in (await listed(agent, session_id))["files"]] == ["a.txt"]


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state") as deployment:
        yield deployment


async def test_a_late_upload_does_not_recreate_a_deleted_session(agent: Agent) -> None:
    session_id = new_session_id()
    await agent.chat(turn("hello", session_id, timeout=90))
    session = agent.server.enrolled().get(session_id)
    begun, proceed = asyncio.Event(), asyncio.Event()

    async def slow_body() -> AsyncIterator[bytes]:
        yield b"secret"
        begun.set()
        await proceed.wait()
        yield b"secret"

    async def send() -> int:
        url = f"{agent.url}/v1/agent/session/{session_id}/files/late.txt"
        async with agent.client.put(url, data=slow_body(), headers=agent.headers) as answer:
            return answer.status

    upload = asyncio.create_task(send())
    await begun.wait()
    await until(lambda: session.files.archive.changed)
    assert (await agent.delete(f"/v1/agent/session/{session_id}"))[0] == 200
    proceed.set()
    assert await upload == 503, "a retry gets 404"
    assert await session.files.save() is not None
    for state in (agent.state, agent.state.parent / "launcher"):
        assert not list(state.glob(f"**/{session_id}*"))


async def test_the_manager_forwards_files_only_to_the_sessions_agent(site: Deployment) -> None:
    stored: dict[str, bytes] = {}

    async def file(request: web.Request) -> web.Response:
        if request.method == "PUT":
            stored[request.match_info["path"]] = await request.read()
            return web.json_response({"session_id": request.match_info["id"], "path": "p", "size": 1})
        return web.Response(body=stored[request.match_info["path"]], content_type="application/octet-stream")

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
    assert stored == {"a folder/data.bin": b"\x00\xff"}
    async with site.http.get(url) as got:
        assert (got.status, await got.read()) == (200, b"\x00\xff")
    async with site.http.get(f"{url}?user_id=bob") as foreign:
        assert foreign.status == 404
    for headers in ({"content-type": "text/plain"}, {}):  # any content type, or none, like curl -T
        async with site.http.put(url, data=b"new", headers=headers, skip_auto_headers=["content-type"]) as undeclared:
            assert undeclared.status == 200
    assert stored == {"a folder/data.bin": b"new"}
    table = b"1,2,3\n" * 100_000  # more commas than the JSON of a request may have
    for headers in ({"content-type": "application/json"}, {"content-type": "text/csv"}, {}):
        async with site.http.put(url, data=table, headers=headers, skip_auto_headers=["content-type"]) as large:
            assert large.status == 200, await large.text()
    assert stored == {"a folder/data.bin": table}
    async with site.http.put(url, data=b"x", headers={**octets, "origin": "http://evil.example"}) as page:
        assert page.status == 403
