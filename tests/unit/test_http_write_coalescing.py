"""The coalescing HTTP protocol: idle connections are closed, busy ones are not, pipelined requests keep their order."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog
from fastapi import FastAPI

from hypercore_agents.agent.persistence.event_ring import EventRing
from hypercore_agents.agent.server import responses
from hypercore_agents.http.serve import bind, serve
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.relay.raw_response import raw_response_of
from hypercore_agents.manager.http import events
from hypercore_agents.manager.http.auth import Caller, caller_of
from hypercore_agents.manager.http.front_door import FrontDoor
from hypercore_agents.manager.open_responses import OpenResponses
from hypercore_agents.manager.sessions.follow import EventStreams
from hypercore_agents.manager.sessions.sessions import Sessions
from support.asgi_server import serve_one_client

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def test_only_idle_connections_are_closed() -> None:
    slow, begun = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            begun.set()
            await slow.wait()
        await answer(scope, receive, send)

    async with serve_one_client(app, 0.2) as (reader, writer, connections), asyncio.timeout(20):
        writer.write(GET)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.write(GET.replace(b"/ ", b"/slow "))
        await begun.wait()
        for protocol in list(connections):
            protocol.timeout_keep_alive_handler()  # as its timer calls it
        slow.set()
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert await reader.read() == b""


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": scope["path"].encode()[:2], "more_body": True})
        await send({"type": "http.response.body", "body": b"ok"})

    async with serve_one_client(app, 5) as (reader, writer, _), asyncio.timeout(20):
        writer.write(b"".join(GET.replace(b"/ ", b"/%d " % number) for number in range(3)))
        for number in range(3):
            assert (await reader.readuntil(b"ok")).endswith(b"\r\n\r\n/%dok" % number)


async def test_log_context_does_not_leak_between_pipelined_requests() -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(structlog.contextvars.get_contextvars()))
        structlog.contextvars.bind_contextvars(trace_id=scope["path"])
        await answer(scope, receive, send)

    async with serve_one_client(app, 5) as (reader, writer, _), asyncio.timeout(20):
        writer.write(GET + GET + GET)  # pipelined
        for _ in range(3):
            await reader.readuntil(b"ok")
    assert seen == [{}, {}, {}]


async def test_the_head_is_sent_before_the_body_exists() -> None:
    body = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await body.wait()
        await send({"type": "http.response.body", "body": b"ok"})

    async with serve_one_client(app, 5) as (reader, writer, _), asyncio.timeout(20):
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        body.set()
        assert await reader.readexactly(2) == b"ok"


async def test_a_disconnect_after_a_large_body_is_detected() -> None:
    reading, gone = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reading.set()
        while (await receive())["more_body"]:
            pass
        direct = raw_response_of(scope)
        assert direct is not None
        direct.on_disconnect(gone.set)
        watching.set()
        await gone.wait()

    watching = asyncio.Event()
    async with serve_one_client(app, 5) as (_, writer, connections), asyncio.timeout(20):
        writer.write(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 102400\r\n\r\n")
        await reading.wait()
        for protocol in list(connections):
            protocol.data_received(b"x" * 102400)  # in one read; a socket may split it
        await watching.wait()
        writer.close()
        await gone.wait()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Respond with the path, the header names and the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    names = b",".join(name for name, _ in scope["headers"])
    body = b"%b %b %d ok" % (scope["path"].encode(), names, size)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def test_bytes_of_a_body_do_not_count_for_the_head_limit() -> None:
    post = b"POST /%d HTTP/1.1\r\nHost: here\r\nContent-Length: 100000\r\n\r\n"
    async with serve_one_client(echo, 5) as (reader, writer, connections), asyncio.timeout(20):
        writer.write((post % 1)[:20])
        while not any(protocol._received_of_head for protocol in connections):
            await asyncio.sleep(0.01)
        for protocol in list(connections):
            protocol.data_received((post % 1)[20:] + b"x" * 100_000 + (post % 2)[:20])
        writer.write((post % 2)[20:] + b"x" * 100_000)
        for number in (1, 2):
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            assert answer.endswith(b"/%d host,content-length 100000 ok\r\n0\r\n\r\n" % number)


async def test_a_400_never_interrupts_another_response() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        begun.set()
        await go_on.wait()

    async with serve_one_client(app, 5) as (reader, writer, _), asyncio.timeout(20):
        writer.write(GET)
        await begun.wait()
        writer.write(b"no request\r\n\r\n")
        answer = await reader.read()
        go_on.set()
    assert (answer.count(b"HTTP/1.1"), answer[-4:]) == (1, b"\r\n\r\n")


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
@pytest.mark.parametrize(
    ("method", "framing", "body", "expected"),
    [
        (b"POST", b"Content-Length: 5\r\n", b"hello", b"content-length 5 ok"),
        (b"POST", b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"transfer-encoding 5 ok"),
        (b"GET", b"X: y\r\n", b"", b"x 0 ok"),
    ],
)
async def test_upgrade_offers_are_ignored(
    offer: bytes, method: bytes, framing: bytes, body: bytes, expected: bytes
) -> None:
    head = (
        b"%b /a HTTP/1.1\r\nHost: here\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AA\r\n"
    )
    request = head % (method, offer) + framing + b"\r\n" + body
    async with serve_one_client(echo, 5) as (reader, writer, _), asyncio.timeout(20):
        writer.write(request + request)
        for _ in range(2):
            answer = await reader.readuntil(b" ok\r\n0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"/a host,connection," + expected in answer
        for byte in request:  # in single bytes
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await reader.readuntil(b" ok\r\n0\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_http_1_0_health_checks_need_no_host() -> None:
    app = FrontDoor(answer, base_domain=None, authenticated=False)
    for start, passes in (
        (b"GET /health HTTP/1.0", True),
        (b"HEAD /ready HTTP/1.0", True),
        (b"GET /health HTTP/1.1", False),
        (b"GET /v1/agents HTTP/1.0", False),
        (b"POST /ready HTTP/1.0", False),
    ):
        async with serve_one_client(app, 5) as (reader, writer, _), asyncio.timeout(20):
            writer.write(start + b"\r\n\r\n")
            line = await reader.readline()
        assert (line.split()[1] == b"200") is passes, start


class Flood:
    """An endless source of events, for the manager's streams and for the agent's log."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def find(self, *_: Any) -> Any:
        return SimpleNamespace(user_id="ada")

    async def follow(self, *_: Any, **__: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0)  # like a wait for events: written bytes are sent at the end of the iteration
                yield b": " + b"x" * 2**20 + b"\n\n"
        finally:
            self.ended.set()


@pytest.mark.parametrize("side", ["manager", "agent"])
async def test_streams_to_stalled_clients_end(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flood = Flood()
    monkeypatch.setattr(events, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(responses, "WRITE_SECONDS", 0.2)
    app: Any
    if side == "manager":
        app = FastAPI()
        opened = OpenResponses("event_streams", "event streams", "MAX_EVENT_STREAMS_PER_USER", 0)
        app.include_router(events.events_router(cast(Sessions, None), cast(EventStreams, flood), opened))
        app.dependency_overrides[caller_of] = lambda: Caller("admin")
    else:
        app = responses.EventFollower(cast(EventRing, flood), None, Tasks("test"))
    async with serve_one_client(app, 5) as (reader, writer, connections), asyncio.timeout(20):
        writer.write(GET.replace(b"/ ", b"/v1/agent/session/ses_1/events/stream "))
        await reader.readuntil(b"\r\n\r\n")

        await flood.ended.wait()
        while connections:
            await asyncio.sleep(0.01)


async def test_a_stop_closes_streams_without_stack_traces(caplog: pytest.LogCaptureFixture) -> None:
    streaming, stop = asyncio.Semaphore(0), asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"event", "more_body": True})
        streaming.release()
        await asyncio.Event().wait()

    listener = bind("127.0.0.1", 0, "PORT")
    port = listener.getsockname()[1]
    serving = asyncio.create_task(serve(endless, listener, grace=0, stop=stop))
    clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
    for number, (_, writer) in enumerate(clients):
        writer.write(f"GET {'/' if number == 0 else '/stream'} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
    async with asyncio.timeout(20):
        for _ in clients:
            await streaming.acquire()
        stop.set()
        await serving
        ends = [await reader.read() for reader, _ in clients]
    for _, writer in clients:
        writer.close()
    assert [b"event" in end for end in ends] == [False, True, True]
    assert not [record for record in caplog.records if record.exc_info]
    assert "ASGI" not in caplog.text
