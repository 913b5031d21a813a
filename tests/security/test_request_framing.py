"""Bytes after the head of a request override nothing in it, on all servers of the shared HTTP protocol."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from joserfc import jwt
from joserfc.jwk import OctKey

from hypercore_agents.http.strict import HEAD_LIMIT, StrictProtocol
from hypercore_agents.http.write_coalescing import CoalescingProtocol
from hypercore_agents.simulator.connection import Protocol as SimulatorProtocol
from hypercore_agents.store.database import sqlite_url
from support.asgi_server import serve_one_client
from support.gateway_server import gateway_site
from support.manager_server import Deployment, deployed
from support.raw_http import send_bytes
from support.simulator_fixtures import RunningSimulator

SECRET = "a-secret-of-more-than-thirty-two-bytes"
CHAT = b'{"user_id": "ada", "prompt": "hi"}'


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state", min_agents=1, enable_auth=True, jwt_secret=SECRET) as running:
        yield running


def chunked(path: str, *headers: str, host: str | None = "127.0.0.1", body: bytes = CHAT, trailer: str = "") -> bytes:
    lines = [f"POST {path} HTTP/1.1", *([f"Host: {host}"] if host else []), "Connection: close", *headers]
    head = "\r\n".join([*lines, "Transfer-Encoding: chunked"]).encode()
    return head + b"\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailer.encode())


async def test_the_manager_ignores_credentials_in_a_trailer(guarded: Deployment) -> None:
    claims = {"sub": "ada", "exp": int(time.time()) + 60}
    bearer = f"Authorization: Bearer {jwt.encode({'alg': 'HS256'}, claims, OctKey.import_key(SECRET))}"
    declared = "Content-Type: application/json"
    answer = await send_bytes(guarded.url, chunked("/v1/agent/chat", declared, trailer=f"{bearer}\r\n"))
    assert answer.startswith(b"HTTP/1.1 401 "), answer
    answer = await send_bytes(guarded.url, chunked("/v1/agent/chat", declared, bearer))
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 ")), "the same field in the head authenticates"


async def test_the_manager_ignores_host_and_content_type_in_a_trailer(guarded: Deployment) -> None:
    answer = await send_bytes(guarded.url, chunked("/v1/agent/chat", trailer="Content-Type: application/json\r\n"))
    assert b'"field":"Content-Type"' in answer
    answer = await send_bytes(guarded.url, chunked("/v1/agent/chat", host=None, trailer="Host: 127.0.0.1\r\n"))
    assert b'"field":"Host"' in answer


async def test_the_gateway_ignores_trailers(tmp_path: Path, simulator: RunningSimulator) -> None:
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "store.db"), simulator.url) as site:
        session_id = await site.session()
        credential = f"x-api-key: {site.token(session_id)}"
        body = b'{"model": "claude-sonnet-5", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}'
        for path in ("/v1/messages", "/internal/heartbeat"):
            answer = await send_bytes(site.url, chunked(path, body=body, trailer=f"{credential}\r\n"))
            assert answer.startswith(b"HTTP/1.1 401 "), answer
        answer = await send_bytes(
            site.url, chunked("/v1/messages", credential, body=body, trailer="anthropic-beta: files\r\n")
        )
        assert answer.startswith(b"HTTP/1.1 200 "), "a trailer that would be refused as a header changes nothing"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    names = b" ".join(name for name, _ in scope["headers"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(names))]})
    await send({"type": "http.response.body", "body": names})


PROTOCOLS = [CoalescingProtocol, SimulatorProtocol]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_fields_of_a_trailer_are_dropped(protocol: type[StrictProtocol]) -> None:
    async with serve_one_client(echo, 30, http=protocol) as (reader, writer, _):
        writer.write(chunked("/", "X-In-Head: 1", trailer="X-In-Trailer: 1\r\nHost: other\r\n"))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"x-in-head" in answer
        assert b"x-in-trailer" not in answer
        assert answer.count(b"host") == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("where", ["trailer", "extension"])
async def test_chunk_framing_is_bounded(protocol: type[StrictProtocol], where: str) -> None:
    """The parser accepts any amount and buffers a trailer until its line ends."""
    async with serve_one_client(echo, 30, http=protocol) as (reader, writer, _):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        await writer.drain()
        writer.write(b"1\r\nx\r\n" + (b"0\r\nX-Long: " if where == "trailer" else b"1;name="))
        answer = b""
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):  # the server closes while the test is sending
                for _ in range(32):
                    writer.write(b"a" * HEAD_LIMIT)
                    await writer.drain()
                answer = await reader.read()
        assert not answer or b"the chunk extensions and the trailer are longer than" in answer


async def test_bodies_in_chunks_of_one_byte_are_accepted() -> None:
    async def length(scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        await send({"type": "http.response.body", "body": b"%06d" % size})

    async with serve_one_client(length, 30) as (reader, writer, _):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            writer.write(b"001;e\r\nx\r\n" * 1000)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert (await reader.read()).endswith(b"100000")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("version", ["0.9", "2.0", "3.0"])
async def test_other_versions_are_refused(protocol: type[StrictProtocol], version: str) -> None:
    async with serve_one_client(echo, 30, http=protocol) as (reader, writer, _):
        writer.write(f"GET / HTTP/{version}\r\nHost: a\r\n\r\n".encode())
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 "), answer


async def test_pipelined_requests_do_not_count_as_framing() -> None:
    async with serve_one_client(echo, 30) as (reader, writer, _):
        request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        count = 4 * HEAD_LIMIT // len(request)
        writer.write(request * count)
        for _ in range(count):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            await reader.readexactly(4)
