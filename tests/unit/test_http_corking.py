"""Our form of uvicorn's protocol: idle connections end, busy ones do not, pipelined requests keep their order."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from hypercore_agents.http.corking import CorkingProtocol
from hypercore_agents.http.serve import bind

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


@contextlib.asynccontextmanager
async def served(
    app: Any, keep_alive: float
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, set[Any]]]:
    """Serve the app; gives one client's connection, and the server's connections."""
    config = uvicorn.Config(app, http=CorkingProtocol, log_config=None, access_log=False, lifespan="off", ws="none")
    config.timeout_keep_alive = keep_alive  # type: ignore[assignment]  # parts of a second do as well
    config.load()
    state = uvicorn.server.ServerState()
    listener = bind("127.0.0.1", 0, "PORT")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: CorkingProtocol(config, state, {}), sock=listener)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    try:
        yield reader, writer, state.connections
    finally:
        writer.close()
        server.close()
        async with asyncio.timeout(20):
            while state.connections:
                await asyncio.sleep(0.01)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def test_an_idle_connection_is_closed_and_one_in_use_is_not() -> None:
    slow, begun = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            begun.set()
            await slow.wait()
        await answer(scope, receive, send)

    async with served(app, 0.2) as (reader, writer, connections), asyncio.timeout(20):
        writer.write(GET)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.write(GET.replace(b"/ ", b"/slow "))
        await begun.wait()
        for protocol in list(connections):
            protocol.timeout_keep_alive_handler()  # as its timer does
        slow.set()
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert await reader.read() == b""


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": scope["path"].encode()[:2], "more_body": True})
        await send({"type": "http.response.body", "body": b"ok"})

    async with served(app, 5) as (reader, writer, _), asyncio.timeout(20):
        writer.write(b"".join(GET.replace(b"/ ", b"/%d " % number) for number in range(3)))
        for number in range(3):
            assert (await reader.readuntil(b"ok")).endswith(b"\r\n\r\n/%dok" % number)


async def test_the_head_leaves_although_the_body_is_not_there() -> None:
    body = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await body.wait()
        await send({"type": "http.response.body", "body": b"ok"})

    async with served(app, 5) as (reader, writer, _), asyncio.timeout(20):
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        body.set()
        assert await reader.readexactly(2) == b"ok"
