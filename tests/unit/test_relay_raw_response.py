"""Streams that bypass ASGI: from the upstream's socket to the client's, through a real server with a real client."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from hypercore_agents.api.errors import AgentUnreachable, DeadlineExceeded, HypercoreError
from hypercore_agents.kit.relay.raw_response import raw_response_of
from hypercore_agents.kit.relay.relay import Message, Observer, Relay, RelayOutcome, RequestLimits
from support.asgi_server import serving
from support.relay_ends import Connection, Script, scripted_upstream

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET /events HTTP/1.1\r\nHost: relay\r\n\r\n"


class EndObserver(Observer):
    """Records chunks; `END` in a chunk is the end of the response."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.waits = asyncio.Event()
        self.go_on = asyncio.Event()

    def chunk(self, data: bytes) -> bool:
        if b"BAD" in data:
            raise AgentUnreachable("the observer does not like it")
        self.seen.append(data)
        return b"END" in data

    async def before_last(self) -> None:
        self.waits.set()
        await self.go_on.wait()

    def error_frame(self, error: HypercoreError) -> bytes:
        return f"event: error\ndata: {error.type}\n\n".encode()


@dataclass
class Front:
    """A served relay, one client's connection to it, and the messages sent by ASGI."""

    observer: EndObserver
    outcome: "asyncio.Future[RelayOutcome]"
    sent: list[Message] = field(default_factory=list)
    reader: asyncio.StreamReader = field(init=False)
    writer: asyncio.StreamWriter = field(init=False)

    async def until_ends_with(self, end: bytes) -> bytes:
        async with asyncio.timeout(20):
            return await self.reader.readuntil(end)


@contextlib.asynccontextmanager
async def front(script: Script, limits: RequestLimits | None = None, drain: bool = False) -> AsyncIterator[Front]:
    relay = Relay(limits=limits or RequestLimits(connect=5, response=20, idle=20, total=40))
    made = Front(EndObserver(), asyncio.get_running_loop().create_future())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return

        async def noted(message: Message) -> None:
            made.sent.append(message)
            await send(message)

        outcome = await relay.relay(
            scope, receive, noted, url=f"{upstream.url}{scope['path']}", observer=made.observer,
            on_disconnect="drain" if drain else "cancel",
        )  # fmt: skip
        if not made.outcome.done():
            made.outcome.set_result(outcome)

    async with scripted_upstream(script) as upstream, serving(app) as url:
        made.reader, made.writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=2**20)
        made.writer.write(GET)
        try:
            yield made
        finally:
            made.writer.close()
            await relay.close()


def stepwise(*pieces: bytes, then: Callable[[Connection], Any] | None = None) -> tuple[Script, asyncio.Semaphore]:
    """An upstream that writes one piece at each release of the semaphore."""
    steps = asyncio.Semaphore(0)

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        for piece in pieces:
            await steps.acquire()
            await connection.chunk(piece)
        if then is not None:
            await then(connection)

    return script, steps


async def test_the_middle_of_a_stream_bypasses_asgi_in_order() -> None:
    script, steps = stepwise(b"data: 1\n\n", b"data: 2\n\ndata: 2", b"2\n\n", b"data: END\n\n", b"")
    async with front(script) as served:
        head = await served.until_ends_with(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        for expected in (b"9\r\ndata: 1\n\n\r\n", b"9\r\ndata: 2\n\n\r\n"):
            steps.release()
            assert await served.until_ends_with(b"\n\n\r\n") == expected
        steps.release()
        assert await served.until_ends_with(b"\n\n\r\n") == b"a\r\ndata: 22\n\n\r\n"
        assert [message["type"] for message in served.sent] == ["http.response.start"]
        steps.release()
        async with asyncio.timeout(20):
            await served.observer.waits.wait()
        assert len(served.sent) == 1  # the end waits until `before_last` has returned
        steps.release()
        served.observer.go_on.set()
        assert (await served.until_ends_with(b"0\r\n\r\n")).startswith(b"b\r\ndata: END\n\n\r\n")
        outcome = await served.outcome
    assert (outcome.status, outcome.sent_bytes, outcome.error) == (200, 9 + 9 + 10 + 11, None)
    assert b"".join(served.observer.seen) == b"data: 1\n\ndata: 2\n\ndata: 22\n\ndata: END\n\n"


async def test_a_connection_serves_several_streams() -> None:
    async def script(connection: Connection) -> None:
        while True:
            line, _, _ = await connection.request()
            await connection.write(SSE)
            for number in range(3):
                await connection.chunk(b"data: %b %d\n\n" % (line.encode(), number))
                await asyncio.sleep(0)
            await connection.chunk(b"")

    async with front(script) as served:
        served.observer.go_on.set()
        served.writer.write(GET.replace(b"/events", b"/again"))  # before the first response has arrived
        first = await served.until_ends_with(b"0\r\n\r\n")
        second = await served.until_ends_with(b"0\r\n\r\n")
    assert (first.count(b"/events"), first.count(b"/again")) == (3, 0)
    assert (second.count(b"/events"), second.count(b"/again")) == (0, 3)


async def test_a_client_that_does_not_read_stops_the_upstream() -> None:
    blocked, size = asyncio.Event(), 64 * 1024
    sent: list[int] = []

    async def script(connection: Connection) -> None:
        await connection.request()
        connection.writer.transport.set_write_buffer_limits(high=1)
        await connection.write(SSE)
        while not blocked.is_set():  # the kernel buffers up to tens of megabytes
            sent.append(size)
            written = asyncio.ensure_future(connection.chunk(b"data: " + b"x" * size + b"\n\n"))
            done, _ = await asyncio.wait([written], timeout=0.3)
            if not done:
                blocked.set()
            await written
        await connection.chunk(b"")

    async with front(script) as served:
        served.observer.go_on.set()
        async with asyncio.timeout(30):
            await blocked.wait()
        await served.until_ends_with(b"\r\n\r\n")
        passed = sum(len(chunk) for chunk in served.observer.seen)
        assert passed < sum(sent)  # only what fits into buffers
        received = 0
        async with asyncio.timeout(30):
            while b"0\r\n\r\n" not in (piece := await served.reader.read(2**20)):
                received += piece.count(b"x")
        received += piece.count(b"x")
        assert (await served.outcome).error is None
    assert received == sum(sent)


async def test_a_disconnect_cancels_the_upstream_request() -> None:
    cancelled = asyncio.Event()

    async def until_cut(connection: Connection) -> None:
        await connection.closed_by_peer()
        cancelled.set()

    script, steps = stepwise(b"data: 1\n\n", then=until_cut)
    async with front(script) as served:
        steps.release()
        await served.until_ends_with(b"data: 1\n\n")
        served.writer.close()
        async with asyncio.timeout(20):
            outcome = await served.outcome
            await cancelled.wait()
    assert outcome.client_gone
    assert outcome.error is None


async def test_draining_continues_after_a_disconnect() -> None:
    script, steps = stepwise(b"data: 1\n\n", b"data: 2\n\n", b"data: END\n\n", b"")
    async with front(script, drain=True) as served:
        served.observer.go_on.set()
        steps.release()
        await served.until_ends_with(b"data: 1\n\n")
        served.writer.close()
        for _ in range(3):
            steps.release()
        async with asyncio.timeout(20):
            outcome = await served.outcome
    assert b"".join(served.observer.seen).endswith(b"data: 2\n\ndata: END\n\n")
    assert outcome.error is None


@pytest.mark.parametrize(
    ("last", "limits", "error"),
    [
        (b"data: ha", RequestLimits(), AgentUnreachable),
        (b"data: ha", RequestLimits(idle=0.3), DeadlineExceeded),
        (b"BAD\n\n", RequestLimits(), AgentUnreachable),
    ],
)
async def test_a_failed_stream_ends_with_an_error_event(
    last: bytes, limits: RequestLimits, error: type[HypercoreError]
) -> None:
    silent = limits.idle < 1

    async def then(connection: Connection) -> None:
        if silent:
            await connection.closed_by_peer()

    script, steps = stepwise(b"data: 1\n\n", last, then=then)
    async with front(script, limits) as served:
        steps.release()
        await served.until_ends_with(b"data: 1\n\n\r\n")
        steps.release()
        rest = await served.reader.read(2**16)
        outcome = await served.outcome
    assert isinstance(outcome.error, error)
    assert rest.partition(b"\r\n")[2].startswith(f"event: error\ndata: {outcome.error.type}\n\n".encode())


async def test_servers_without_raw_responses_are_supported() -> None:
    assert raw_response_of({"type": "http"}) is None
    assert raw_response_of({"type": "http", "extensions": {"http.response.push": {}}}) is None
