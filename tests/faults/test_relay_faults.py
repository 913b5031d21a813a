"""Faults of the upstream (it refuses, stalls, dies, sends invalid responses) and disconnects of the client."""

import asyncio
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest

from hypercore_agents.api.errors import (
    AgentUnreachable,
    DeadlineExceeded,
    HypercoreError,
    ModelFailed,
    PayloadTooLarge,
)
from hypercore_agents.kit.relay.relay import Observer, Peer, Relay, RelayOutcome, RequestLimits, ShuttingDown
from support.asgi_server import serving
from support.ports import free_port
from support.relay_ends import AsgiClient, Connection, echo_bodies, scripted_upstream

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    relay = Relay(limits=RequestLimits(connect=2, response=10, idle=10, total=20))
    yield relay
    await relay.close()


class ErrorFrames(Observer):
    def error_frame(self, error: HypercoreError) -> bytes:
        return f"event: error\ndata: {error.type}\n\n".encode()


async def pass_one(
    relay: Relay, url: str, client: AsgiClient | None = None, limits: RequestLimits | None = None
) -> tuple[AsgiClient, RelayOutcome]:
    client = client or AsgiClient(body=[b"{}"])
    outcome = await relay.relay(
        client.scope, client.receive, client.send, url=url, limits=limits, observer=ErrorFrames()
    )
    return client, outcome


async def test_a_refused_connection_is_an_error(relay: Relay) -> None:
    with pytest.raises(AgentUnreachable) as caught:
        await pass_one(relay, f"http://127.0.0.1:{free_port()}")
    assert "127.0.0.1" not in caught.value.message


async def test_errors_name_the_upstream() -> None:
    relay = Relay(peer=Peer("the Claude API", ModelFailed))
    with pytest.raises(ModelFailed, match="the Claude API could not be reached"):
        await pass_one(relay, f"http://127.0.0.1:{free_port()}")
    await relay.close()


async def test_a_refused_connection_is_retried_once(relay: Relay) -> None:
    port = free_port()
    task = asyncio.create_task(pass_one(relay, f"http://127.0.0.1:{port}"))

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await echo_bodies(Connection(reader, writer, 1, []))
        except asyncio.IncompleteReadError:
            writer.close()

    await asyncio.sleep(0)
    server = await asyncio.start_server(accept, "127.0.0.1", port)
    client, _ = await task
    assert client.body == b"{}"
    await relay.close()
    server.close()
    await server.wait_closed()


async def test_requests_that_may_have_arrived_are_not_repeated(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()

    async with scripted_upstream(script) as upstream:
        with pytest.raises(AgentUnreachable, match="without a response"):
            await pass_one(relay, upstream.url)
    assert len(upstream.requests) == 1


async def test_stale_pooled_connections_are_replaced(relay: Relay) -> None:
    close_now, closed = asyncio.Event(), asyncio.Event()

    async def script(connection: Connection) -> None:
        if connection.number > 1:
            await echo_bodies(connection)
        await connection.request()
        await connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await close_now.wait()
        connection.writer.transport.abort()
        closed.set()

    async with scripted_upstream(script) as upstream:
        await pass_one(relay, upstream.url)
        close_now.set()
        await closed.wait()
        client, _ = await pass_one(relay, upstream.url)
    assert client.body == b"{}"
    assert upstream.connections == 2
    assert len(upstream.requests) == 2


async def test_unprocessed_closes_are_detected_at_the_socket() -> None:
    """The server's FIN arrives while the event loop is busy; only the socket shows it when the request is written."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    relay = Relay(limits=RequestLimits(connect=5, response=5))

    def serve(close_after: bool) -> socket.socket:
        accepted, _ = listener.accept()
        accepted.settimeout(10)
        data = b""
        while not data.endswith(b"{}"):
            data += accepted.recv(65536)
        accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        if close_after:
            accepted.close()
        return accepted

    with listener:
        answered = asyncio.create_task(asyncio.to_thread(serve, False))
        answer = await relay.open("POST", url, body=b"{}")
        assert await answer.read(10) == b"ok"
        first = await answered
        first.close()  # synchronously: the loop has not read the FIN when the next request starts
        answered = asyncio.create_task(asyncio.to_thread(serve, True))
        answer = await relay.open("POST", url, body=b"{}")
        assert await answer.read(10) == b"ok"
        answer.close()
        await answered
    await relay.close()


async def test_an_upstream_that_never_answers_times_out(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.closed_by_peer()

    async with scripted_upstream(script) as upstream:
        with pytest.raises(DeadlineExceeded, match="did not answer within"):
            await pass_one(relay, upstream.url, limits=RequestLimits(response=0.1))


async def test_a_silent_stream_ends_with_an_error_event(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1\n\ndata: ha")
        await connection.closed_by_peer()

    async with scripted_upstream(script) as upstream:
        client, outcome = await pass_one(relay, upstream.url, limits=RequestLimits(idle=0.1))
    assert isinstance(outcome.error, DeadlineExceeded)
    assert client.body == b"data: 1\n\nevent: error\ndata: deadline_exceeded\n\n"
    assert client.complete


async def test_a_stream_over_its_total_time_ends_with_an_error_event(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        while True:
            await connection.chunk(b": alive\n\n")
            await asyncio.sleep(0.02)

    async with scripted_upstream(script) as upstream:
        client, outcome = await pass_one(relay, upstream.url, limits=RequestLimits(idle=5, total=0.3))
    assert isinstance(outcome.error, DeadlineExceeded)
    assert client.body.endswith(b": alive\n\nevent: error\ndata: deadline_exceeded\n\n")


async def test_a_stream_that_is_cut_off_ends_with_an_error_event(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1\n\ndata: half")

    async with scripted_upstream(script) as upstream:
        client, outcome = await pass_one(relay, upstream.url)
    assert isinstance(outcome.error, AgentUnreachable)
    assert client.body == b"data: 1\n\nevent: error\ndata: agent_unreachable\n\n"
    assert client.complete


async def test_the_client_detects_a_plain_response_that_is_cut_off(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort")

    async with scripted_upstream(script) as upstream:

        async def app(scope: object, receive: object, send: object) -> None:
            assert isinstance(scope, dict)
            if scope["type"] == "http":
                await relay.relay(scope, receive, send, url=upstream.url)  # type: ignore[arg-type]

        async with serving(app) as url, aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientPayloadError):
                async with session.post(url, data=b"{}") as answer:
                    await answer.read()


@pytest.mark.parametrize(
    "nonsense", [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nx" + b"y" * 40000 + b": 1\r\n\r\n", b"\x16\x03\x01\x00\xa5"]
)
async def test_invalid_responses_are_errors(relay: Relay, nonsense: bytes) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(nonsense)

    async with scripted_upstream(script) as upstream:
        with pytest.raises(AgentUnreachable):
            await pass_one(relay, upstream.url)
    assert len(upstream.requests) == 1


async def test_responses_over_the_limit_are_cut_off(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        for _ in range(100):
            await connection.chunk(b"data: " + b"x" * 1000 + b"\n\n")

    async with scripted_upstream(script) as upstream:
        client, outcome = await pass_one(relay, upstream.url, limits=RequestLimits(response_bytes=5000))
    assert isinstance(outcome.error, PayloadTooLarge)
    assert client.body.endswith(b"event: error\ndata: payload_too_large\n\n")
    assert len(client.body) < 200_000


async def test_a_disconnect_cancels_the_upstream_request(relay: Relay) -> None:
    cancelled = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1\n\n")
        await connection.closed_by_peer()
        cancelled.set()

    client = AsgiClient(body=[b"{}"])
    async with scripted_upstream(script) as upstream:
        task = asyncio.create_task(pass_one(relay, upstream.url, client))
        await client.until(lambda: client.body == b"data: 1\n\n")
        client.disconnect()
        _, outcome = await task
        async with asyncio.timeout(5):
            await cancelled.wait()
    assert outcome.client_gone
    assert outcome.error is None
    assert client.body == b"data: 1\n\n"


async def test_a_disconnect_before_the_response_cancels_the_request(relay: Relay) -> None:
    arrived, cancelled = asyncio.Event(), asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        arrived.set()
        await connection.closed_by_peer()
        cancelled.set()

    client = AsgiClient(body=[b"{}"])
    async with scripted_upstream(script) as upstream:
        task = asyncio.create_task(pass_one(relay, upstream.url, client))
        async with asyncio.timeout(5):
            await arrived.wait()
        client.disconnect()
        _, outcome = await task
        async with asyncio.timeout(5):
            await cancelled.wait()
    assert outcome.client_gone
    assert outcome.status == 0
    assert client.messages == []


async def test_a_disconnect_during_the_request_body_aborts_the_upload(relay: Relay) -> None:
    ended = asyncio.Event()

    async def script(connection: Connection) -> None:
        try:
            await connection.request()
        finally:
            ended.set()

    client = AsgiClient(headers=[(b"content-length", b"1000")], body=[])
    client._incoming.get_nowait()
    client._incoming.put_nowait({"type": "http.request", "body": b"begin", "more_body": True})
    client.disconnect()
    async with scripted_upstream(script) as upstream:
        _, outcome = await pass_one(relay, upstream.url, client)
        async with asyncio.timeout(5):
            await ended.wait()
    assert outcome.client_gone
    assert client.messages == []


async def test_draining_reads_the_complete_response(relay: Relay) -> None:
    left = asyncio.Event()

    class Counting(Observer):
        seen = b""
        told = False

        def chunk(self, data: bytes) -> bool:
            self.seen += data
            return False

        async def before_last(self) -> None:
            self.told = True

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1\n\n")
        await left.wait()
        await connection.chunk(b"data: 2\n\n")
        await connection.chunk(b"")

    client = AsgiClient(body=[b"{}"])
    observer = Counting()
    async with scripted_upstream(script) as upstream:
        task = asyncio.create_task(
            relay.relay(
                client.scope, client.receive, client.send, url=upstream.url, observer=observer, on_disconnect="drain"
            )
        )
        await client.until(lambda: client.body == b"data: 1\n\n")
        client.disconnect()
        left.set()
        outcome = await task
    assert outcome.client_gone
    assert (observer.seen, observer.told) == (b"data: 1\n\ndata: 2\n\n", True)


async def test_no_task_or_connection_is_leaked(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.closed_by_peer()

    before = {task for task in asyncio.all_tasks() if not task.done()}
    async with scripted_upstream(script) as upstream:
        for _ in range(5):
            client = AsgiClient(body=[b"{}"])
            task = asyncio.create_task(pass_one(relay, upstream.url, client))
            await client.until_response_begins()
            client.disconnect()
            await task
    async with asyncio.timeout(5):
        while {task for task in asyncio.all_tasks() if not task.done()} - before:
            await asyncio.sleep(0)


async def test_requests_without_a_response_fail_when_the_server_stops(relay: Relay) -> None:
    async def silent(connection: Connection) -> None:
        await connection.request()
        await connection.closed_by_peer()

    async with scripted_upstream(silent) as other:
        task = asyncio.create_task(pass_one(relay, other.url))
        async with asyncio.timeout(20):
            while not other.connections:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(ShuttingDown, match="shut down before the request ended") as told:
            await task
    assert (told.value.status, told.value.retryable) == (503, False)


async def test_streams_end_with_an_error_event_when_the_server_stops(relay: Relay) -> None:
    async def half(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: one\n\n")
        await connection.closed_by_peer()

    client = AsgiClient(body=[b"{}"])
    async with scripted_upstream(half) as other:
        task = asyncio.create_task(pass_one(relay, other.url, client))
        await client.until_body_ends_with(b"data: one\n\n")
        task.cancel()
        _, outcome = await task
    assert client.body.endswith(b"event: error\ndata: unavailable\n\n")
    assert isinstance(outcome.error, ShuttingDown)
