"""Clients during a server restart and after a lost answer: they wait, and never run a turn twice."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web

from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.client import AsyncClient, Client, ClientError, Retrying, ServerError, Unreachable
from hypercore_agents.client.retry_policy import Retrying as Rules
from support.manager_server import aiohttp_served
from support.ports import free_port
from support.scripted_server import RESULT, STARTED, Server, fails, numbered, says, streams

pytestmark = pytest.mark.timeout(60)
PATIENT = Retrying(first=0.01, longest=5.0, outage=30.0)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.serve)
    async with aiohttp_served(app) as server.url:
        yield server


async def closes(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def chats(url: str) -> list[ChatResponse | ClientError]:
    """Chat once through each client; return responses or errors."""
    found: list[ChatResponse | ClientError] = []
    try:
        found.append(await asyncio.to_thread(lambda: Client(url, retrying=PATIENT).chat("hello", user_id="ada")))
    except ClientError as error:
        found.append(error)
    async with AsyncClient(url, retrying=PATIENT) as client:
        try:
            found.append(await client.chat("hello", user_id="ada"))
        except ClientError as error:
            found.append(error)
    return found


def test_default_retries_outlast_a_restart_only() -> None:
    rules, gone = Rules(), Unreachable("refused", sent=False)
    waited, attempt = 0.0, 0
    while (pause := rules.pause(gone, attempt := attempt + 1, repeatable=False, since=waited)) is not None:
        assert pause <= 5
        waited += pause
    assert 30 < waited < 70
    assert rules.pause(Unreachable("cut", sent=True), 1, repeatable=False) is None
    assert Rules(attempts=1).pause(gone, 1, repeatable=True) is None


async def test_clients_wait_for_a_server_that_restarts() -> None:
    """The port is closed until the server starts: nothing was sent, so streams are retried too."""
    port = free_port()
    async with AsyncClient(f"http://127.0.0.1:{port}", retrying=PATIENT) as client:
        chat = asyncio.create_task(client.chat("hello", user_id="ada"))
        stream = client.stream("hello", user_id="ada")
        streamed = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        app = web.Application()

        async def answer(request: web.Request) -> web.StreamResponse:
            if (await request.json()).get("stream"):
                return await streams(numbered(1, "session", STARTED), numbered(2, "result", RESULT))(request)
            return web.json_response(RESULT)

        app.router.add_post("/v1/agent/chat", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            assert (await chat).content == "one two"
            assert (await streamed).content == "one two"
        finally:
            await runner.cleanup()


async def test_clients_wait_for_an_unavailable_dependency(server: Server) -> None:
    server.script = [*[fails("unavailable", 503, retryable=True)] * 8, says(RESULT)]
    async with AsyncClient(server.url, retrying=PATIENT) as client:
        assert (await client.chat("hello", user_id="ada")).content == "one two"


async def test_lost_chat_answers_are_requested_again_with_the_same_key(server: Server) -> None:
    """The server returns the first request's answer after reporting that it is still in progress."""
    busy = fails("conflict", 409, retryable=True)
    server.script = [closes, busy, busy, busy, busy, busy, says(RESULT)] * 2
    for found in await chats(server.url):
        assert isinstance(found, ChatResponse), found
    keys = [headers["Idempotency-Key"] for _, headers, _ in server.requests]
    assert (len(keys), len(set(keys[:7])), len(set(keys))) == (14, 1, 2)


async def test_failed_turns_with_side_effects_are_not_retried(server: Server) -> None:
    server.script = [fails("model_error", 502, retryable=False), fails("conflict", 409, retryable=False)]
    assert [type(found) for found in await chats(server.url)] == [ServerError, ServerError]
    assert len(server.requests) == 2


async def test_streams_use_their_own_connection_and_are_not_resent(server: Server) -> None:
    peers = set()

    async def note(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return await streams(numbered(1, "session", STARTED), numbered(2, "result", RESULT))(request)

    async with AsyncClient(server.url, retrying=PATIENT) as client:
        server.script = [note, note]
        for _ in range(2):
            await client.stream("hello", user_id="ada").result()
        assert len(peers) == 2, "a kept-alive connection may be dead without the client noticing"
        server.script = [closes]
        with pytest.raises(Unreachable) as caught:
            await client.stream("hello", user_id="ada").result()
        assert caught.value.sent
