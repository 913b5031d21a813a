"""A relay between an ASGI client and a real loopback server: what is relayed, when, and in which order."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from hypercore_agents.api.errors import HypercoreError, InvalidRequest, ModelFailed, PayloadTooLarge
from hypercore_agents.kit.relay.relay import Observer, Relay, RequestLimits
from support.asgi_server import serving
from support.relay_ends import AsgiClient, Connection, echo_bodies, scripted_upstream

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    relay = Relay(limits=RequestLimits(connect=2, response=10, idle=10, total=20))
    yield relay
    await relay.close()


async def test_request_and_response_are_relayed_completely(relay: Relay) -> None:
    client = AsgiClient(
        headers=[
            (b"content-type", b"application/json"),
            (b"connection", b"x-hop"),
            (b"x-hop", b"1"),
            (b"host", b"ours"),
        ],
        body=[b"one", b"two"],
    )
    client.scope["state"] = {"request_id": "req_1"}
    async with scripted_upstream(echo_bodies) as upstream:
        outcome = await relay.relay(
            client.scope,
            client.receive,
            client.send,
            url=f"{upstream.url}/a%2Fb?x=%20",
            headers=[("Authorization", "Bearer b")],
        )
    line, headers, body = upstream.requests[0]
    assert (line, body) == ("POST /a%2Fb?x=%20 HTTP/1.1", b"onetwo")
    assert headers == {
        "host": upstream.url.removeprefix("http://"),
        "content-type": "application/json",
        "content-length": "6",
        "x-request-id": "req_1",
        "authorization": "Bearer b",
    }
    assert (client.status, client.body, client.complete) == (200, b"onetwo", True)
    assert (outcome.status, outcome.sent_bytes, outcome.error, outcome.client_gone) == (200, 6, None, False)


async def test_a_body_of_unknown_length_is_forwarded_in_chunks(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        _, headers, body = await connection.request()
        assert headers["transfer-encoding"] == "chunked"
        await connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    client = AsgiClient(headers=[(b"transfer-encoding", b"chunked")], body=[b"one", b"two"])
    async with scripted_upstream(script) as upstream:
        await relay.relay(client.scope, client.receive, client.send, url=upstream.url)
    assert client.body == b"onetwo"


async def test_without_pass_headers_only_given_headers_are_sent(relay: Relay) -> None:
    client = AsgiClient(headers=[(b"cookie", b"a=b"), (b"x-api-key", b"token")], body=[b"x"])
    client.scope["state"] = {"request_id": "req_1"}
    async with scripted_upstream(echo_bodies) as upstream:
        await relay.relay(
            client.scope, client.receive, client.send,
            url=upstream.url, pass_headers=False, headers=[("x-api-key", "key")], body=b"rewritten",
        )  # fmt: skip
    assert set(upstream.requests[0][1]) == {"host", "x-api-key", "content-length"}
    assert upstream.requests[0][1]["x-api-key"] == "key"
    assert upstream.requests[0][2] == b"rewritten"


async def test_connections_are_reused(relay: Relay) -> None:
    async with scripted_upstream(echo_bodies) as upstream:
        for _ in range(5):
            client = AsgiClient(body=[b"x"])
            await relay.relay(client.scope, client.receive, client.send, url=upstream.url)
            assert client.complete
    assert upstream.connections == 1


async def test_chunks_are_relayed_as_they_arrive(relay: Relay) -> None:
    proceed = asyncio.Queue[None]()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        for number in range(3):
            await connection.chunk(b"data: %d\n\n" % number)
            await proceed.get()
        await connection.chunk(b"")

    client = AsgiClient(body=[b"{}"])
    async with scripted_upstream(script) as upstream:
        task = asyncio.create_task(relay.relay(client.scope, client.receive, client.send, url=upstream.url))
        for number in range(3):
            await client.until_body_ends_with(b"data: %d\n\n" % number)
            proceed.put_nowait(None)
        await task
    assert client.complete


async def test_drain_begun_cancels_only_before_the_first_bytes(relay: Relay) -> None:
    requested, left, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def silent(connection: Connection) -> None:
        await connection.request()
        requested.set()
        await connection.closed_by_peer()
        cancelled.set()

    async def answering(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1\n\n")
        await left.wait()
        await connection.chunk(b"data: 2\n\n")
        await connection.chunk(b"")

    client = AsgiClient(body=[b"{}"])
    async with scripted_upstream(silent) as upstream:
        task = asyncio.create_task(
            relay.relay(client.scope, client.receive, client.send, url=upstream.url, on_disconnect="drain_begun")
        )
        await requested.wait()
        client.disconnect()
        assert (await task).client_gone
        await cancelled.wait()
    client = AsgiClient(body=[b"{}"])
    seen: list[bytes] = []

    class ChunkObserver(Observer):
        def chunk(self, data: bytes) -> bool:
            seen.append(data)
            return False

    async def receive() -> Any:
        message = await client.receive()
        if message["type"] == "http.disconnect":
            left.set()
        return message

    async with scripted_upstream(answering) as upstream:
        task = asyncio.create_task(
            relay.relay(
                client.scope,
                receive,
                client.send,
                url=upstream.url,
                observer=ChunkObserver(),
                on_disconnect="drain_begun",
            )
        )
        await client.until_body_ends_with(b"1\n\n")
        client.disconnect()
        outcome = await task
    assert outcome.client_gone
    assert b"".join(seen).endswith(b"2\n\n")


async def test_a_slow_client_slows_down_the_upstream(relay: Relay) -> None:
    written = 0
    blocked = asyncio.Event()

    async def script(connection: Connection) -> None:
        nonlocal written
        await connection.request()
        connection.writer.transport.set_write_buffer_limits(high=1)
        await connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n")
        piece = b"x" * 65536
        for _ in range(1024):
            connection.writer.write(piece)
            drained = asyncio.ensure_future(connection.writer.drain())
            done, _ = await asyncio.wait([drained], timeout=0.5)
            if not done:
                blocked.set()
            await drained
            written += len(piece)

    client = AsgiClient(body=[b"{}"], take_at_once=False)
    async with scripted_upstream(script) as upstream:
        task = asyncio.create_task(relay.relay(client.scope, client.receive, client.send, url=upstream.url))
        async with asyncio.timeout(15):
            await blocked.wait()
        assert written < 32 * 1024 * 1024  # what fits into buffers, far less than all
        for _ in range(3000):
            client.take()
        await task
    assert len(client.body) == 67108864


async def test_incomplete_frames_are_held_back(relay: Relay) -> None:
    proceed = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1\n\ndata: 2")
        await proceed.wait()
        await connection.chunk(b"2\n\n: tail")
        await connection.chunk(b"")

    client = AsgiClient(body=[b"{}"])
    async with scripted_upstream(script) as upstream:
        task = asyncio.create_task(relay.relay(client.scope, client.receive, client.send, url=upstream.url))
        await client.until(lambda: len(client.messages) == 2)
        assert client.body == b"data: 1\n\n"
        proceed.set()
        await task
    assert client.body == b"data: 1\n\ndata: 22\n\n: tail"


class Recording(Observer):
    def __init__(self, client: AsgiClient, mark: bytes = b"END") -> None:
        self.client = client
        self.mark = mark
        self.calls: list[str] = []
        self.seen = b""
        self.seen_by_client: bytes | None = None

    def chunk(self, data: bytes) -> bool:
        self.seen += data
        return self.mark in data

    async def before_last(self) -> None:
        await asyncio.sleep(0)
        self.calls.append("before_last")
        self.seen_by_client = self.client.body

    def error_frame(self, error: HypercoreError) -> bytes:
        return f"event: error\ndata: {error.type}\n\n".encode()


async def test_before_last_runs_before_the_chunk_with_the_end(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1\n\n")
        await client.until(lambda: client.body == b"data: 1\n\n")
        await connection.chunk(b"data: END\n\n")
        await connection.chunk(b"")

    client = AsgiClient(body=[b"{}"])
    observer = Recording(client)
    async with scripted_upstream(script) as upstream:
        await relay.relay(client.scope, client.receive, client.send, url=upstream.url, observer=observer)
    assert observer.calls == ["before_last"]
    assert observer.seen_by_client == b"data: 1\n\n"
    assert client.body == b"data: 1\n\ndata: END\n\n"


async def test_only_the_last_frame_waits_for_before_last(relay: Relay) -> None:
    class FrameObserver(Recording):
        def last_frame_offset(self, frames: bytes) -> int:
            return frames.index(b"data: END")

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1")
        await connection.chunk(b"\n\ndata: 2\n\ndata: END\n\ndata: more\n\n")
        await connection.chunk(b"")

    client = AsgiClient(body=[b"{}"])
    observer = FrameObserver(client)
    async with scripted_upstream(script) as upstream:
        outcome = await relay.relay(client.scope, client.receive, client.send, url=upstream.url, observer=observer)
    assert observer.calls == ["before_last"]
    assert observer.seen_by_client == b"data: 1\n\ndata: 2\n\n"
    assert client.body == b"data: 1\n\ndata: 2\n\ndata: END\n\ndata: more\n\n"
    assert outcome.sent_bytes == len(client.body)


async def test_before_last_runs_before_the_last_bytes_of_a_plain_response(relay: Relay) -> None:
    client = AsgiClient(body=[b"whole"])
    observer = Recording(client)
    async with scripted_upstream(echo_bodies) as upstream:
        await relay.relay(client.scope, client.receive, client.send, url=upstream.url, observer=observer)
    assert observer.calls == ["before_last"]
    assert observer.seen_by_client == b""
    assert client.body == observer.seen == b"whole"


async def test_an_incomplete_stream_ends_with_an_error_event(relay: Relay) -> None:
    class Unfinished(Recording):
        def end(self) -> HypercoreError:
            return ModelFailed("no message_stop")

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(SSE)
        await connection.chunk(b"data: 1\n\n")
        await connection.chunk(b"")

    client = AsgiClient(body=[b"{}"])
    observer = Unfinished(client)
    async with scripted_upstream(script) as upstream:
        outcome = await relay.relay(client.scope, client.receive, client.send, url=upstream.url, observer=observer)
    assert isinstance(outcome.error, ModelFailed)
    assert client.body == b"data: 1\n\nevent: error\ndata: model_error\n\n"
    assert client.complete
    assert observer.calls == []


async def test_redirects_are_not_followed_and_cookies_are_dropped(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        while True:
            await connection.request()
            await connection.write(
                "HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/\r\nSet-Cookie: a=b\r\n"
                "X-Hypercore-Secret: s\r\nContent-Length: 0\r\n\r\n"
            )

    async with scripted_upstream(script) as upstream:
        for _ in range(2):
            client = AsgiClient(method="GET")
            await relay.relay(client.scope, client.receive, client.send, url=upstream.url)
            assert client.status == 307
            assert client.headers == {b"location": b"http://127.0.0.1:1/", b"content-length": b"0"}
    assert "cookie" not in upstream.requests[1][1]


async def test_compressed_bytes_are_not_changed(relay: Relay) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc")

    client = AsgiClient(method="GET")
    async with scripted_upstream(script) as upstream:
        await relay.relay(client.scope, client.receive, client.send, url=upstream.url)
    assert client.body == b"abc"
    assert client.headers[b"content-encoding"] == b"gzip"


@pytest.mark.parametrize("announced", [True, False])
async def test_request_bodies_over_the_limit_are_refused(relay: Relay, announced: bool) -> None:
    head = [] if announced else [(b"transfer-encoding", b"chunked")]
    client = AsgiClient(headers=head, body=[b"x" * 60, b"x" * 60])
    async with scripted_upstream(echo_bodies) as upstream:
        with pytest.raises(PayloadTooLarge):
            await relay.relay(
                client.scope, client.receive, client.send, url=upstream.url, limits=RequestLimits(request_bytes=100)
            )
    assert upstream.requests == []
    assert client.messages == []


async def test_ambiguous_requests_never_reach_the_upstream(relay: Relay) -> None:
    client = AsgiClient(headers=[(b"content-length", b"4"), (b"transfer-encoding", b"chunked")], body=[b"0\r\n\r\n"])
    async with scripted_upstream(echo_bodies) as upstream:
        with pytest.raises(InvalidRequest):
            await relay.relay(client.scope, client.receive, client.send, url=upstream.url)
    assert upstream.connections == 0


async def test_large_bodies_pass_both_ways_through_a_real_server(relay: Relay) -> None:
    data = bytes(range(256)) * 4096
    async with scripted_upstream(echo_bodies) as upstream:

        async def app(scope: object, receive: object, send: object) -> None:
            assert isinstance(scope, dict)
            if scope["type"] == "http":
                await relay.relay(scope, receive, send, url=upstream.url)  # type: ignore[arg-type]

        async with serving(app) as url, aiohttp.ClientSession() as session:
            for _ in range(3):
                async with session.post(url, data=data) as answer:
                    assert await answer.read() == data


async def test_a_response_opened_directly_can_be_read_completely(relay: Relay) -> None:
    async with scripted_upstream(echo_bodies) as upstream:
        answer = await relay.open("POST", upstream.url, body=b"hello")
        assert answer.status == 200
        assert await answer.read(100) == b"hello"
        answer.close()
        answer = await relay.open("POST", upstream.url, body=b"hello")
        with pytest.raises(PayloadTooLarge):
            await answer.read(4)
        answer.close()
