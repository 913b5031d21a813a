"""Requests that stop arriving end with 408; requests delayed by the server do not. Tested for all HTTP protocols."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import uvicorn

from hypercore_agents.api.errors import ErrorBody
from hypercore_agents.http.receive_timeouts import TimeoutProtocol
from hypercore_agents.http.serve import serve, serve_beside
from hypercore_agents.http.write_coalescing import CoalescingProtocol
from hypercore_agents.simulator.app import Simulator
from hypercore_agents.simulator.connection import Protocol
from hypercore_agents.simulator.worker import _configuration
from support.asgi_server import serve_one_client
from support.waiting import until

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n"
both = pytest.mark.parametrize("http", [CoalescingProtocol, Protocol])


class App:
    """Reads and answers a request as configured, and records what it received."""

    def __init__(self, *, reads: bool = True, begins: bool = False, answers: bool = True) -> None:
        self.received: list[Any] = []
        self.begun, self.read, self.go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._reads, self._begins = reads, begins
        if answers:
            self.go_on.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._begins:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        self.begun.set()
        while self._reads:
            message = await receive()
            self.received.append(message["type"])
            self.read.set()
            if not message.get("more_body"):
                break
        await self.go_on.wait()
        if not self._begins:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def until_served(connections: set[Any]) -> TimeoutProtocol:
    await until(lambda: bool(connections))
    (protocol,) = connections
    assert isinstance(protocol, TimeoutProtocol)
    return protocol


def is_408(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = ErrorBody.model_validate_json(body).error
    return (
        head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        and b"connection: close" in head
        and (error.type, error.retryable) == ("request_timeout", True)
    )


@both
async def test_a_slowly_arriving_head_is_refused_with_408(http: type[TimeoutProtocol]) -> None:
    app = App()
    async with serve_one_client(app, 75, http=http, receive_timeout=0.1) as (reader, writer, _), asyncio.timeout(20):

        async def trickle() -> None:
            for byte in GET[:-1] + b"x" * 1_000_000:
                writer.write(bytes((byte,)))
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        answer = await reader.read(65_536)  # not to the end, because a reset may follow the response
        trickling.cancel()
    assert is_408(answer)
    assert not app.begun.is_set()


@both
async def test_a_connection_without_a_request_is_closed(http: type[TimeoutProtocol]) -> None:
    async with serve_one_client(App(), 75, http=http, receive_timeout=0.1) as (reader, _, _), asyncio.timeout(20):
        assert await reader.read() == b""


@both
async def test_only_a_stalled_body_is_refused(http: type[TimeoutProtocol]) -> None:
    app = App()
    async with serve_one_client(app, 75, http=http) as (reader, writer, connections), asyncio.timeout(20):
        writer.write(POST % 5)
        protocol = await until_served(connections)
        await app.begun.wait()
        for number in range(3):
            protocol.check_progress(1)
            app.read.clear()
            writer.write(b"x")
            await app.read.wait()
            assert len(app.received) == number + 1
        protocol.check_progress(1)
        protocol.check_progress(1)
        assert is_408(await reader.read())
        await until(lambda: app.received[-1] == "http.disconnect")


@both
async def test_requests_delayed_by_the_server_do_not_time_out(http: type[TimeoutProtocol]) -> None:
    for app, request in (
        (App(answers=False), GET),  # still at work
        (App(reads=False, answers=False), POST % 200_000 + b"x" * 100_000),  # does not read
        (App(reads=False, answers=False), GET[:-2] + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"),
    ):
        async with serve_one_client(app, 75, http=http) as (reader, writer, connections), asyncio.timeout(20):
            writer.write(request)
            protocol = await until_served(connections)
            await app.begun.wait()
            if len(request) > 100_000:
                await until(lambda: protocol.flow.read_paused)  # noqa: B023  awaited at once
            for _ in range(4):
                protocol.check_progress(1)
            app.go_on.set()
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")


@both
async def test_idle_connections_have_only_the_keep_alive_timeout(
    http: type[TimeoutProtocol],
) -> None:
    app = App()
    async with serve_one_client(app, 75, http=http) as (reader, writer, connections), asyncio.timeout(20):
        for _ in range(2):
            writer.write(GET)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            protocol = await until_served(connections)
            for _ in range(4):
                protocol.check_progress(1)
        writer.write(b"\r\n")  # not a request: the parser skips it, and the timer stops
        await until(lambda: not protocol.is_idle())
        protocol.check_progress(1)
        protocol.check_progress(1)
        assert await reader.read() == b""


@both
async def test_a_408_never_interrupts_a_response(http: type[TimeoutProtocol]) -> None:
    async def begun(app: App, _: asyncio.StreamReader) -> None:
        await app.read.wait()

    async def answered(_: App, reader: asyncio.StreamReader) -> None:
        await reader.readuntil(b"ok")

    cases: list[tuple[App, Callable[[App, asyncio.StreamReader], Awaitable[None]]]] = [
        (App(begins=True), begun),
        (App(reads=False), answered),  # the rest of a body that was not read
    ]
    for app, ready in cases:
        async with serve_one_client(app, 75, http=http) as (reader, writer, connections), asyncio.timeout(20):
            writer.write(POST % 5 + b"x")
            protocol = await until_served(connections)
            await ready(app, reader)
            protocol.check_progress(1)
            protocol.check_progress(1)
            rest = b""
            with contextlib.suppress(ConnectionResetError):
                rest = await reader.read()
            assert b"408" not in rest


def test_every_server_has_receive_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []

    class Seen(uvicorn.Config):
        def __init__(self, *args: Any, http: Any, **named: Any) -> None:
            used.append(http)
            raise LookupError

    monkeypatch.setattr(uvicorn, "Config", Seen)
    listener = socket.socket()
    for served_by in (serve(None, listener), serve_beside(None, listener)):
        with pytest.raises(LookupError):
            asyncio.run(served_by)
    with pytest.raises(LookupError):
        _configuration(cast(Simulator, None))
    listener.close()
    assert used == [CoalescingProtocol, CoalescingProtocol, Protocol]
