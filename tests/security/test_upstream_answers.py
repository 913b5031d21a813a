"""What a hostile or misled upstream of the gateway can pass on, and what the gateway reveals to it about users."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hypercore_agents.store.database import sqlite_url
from support.gateway_server import MODEL, PLATFORM_KEY, Site, gateway_site
from support.relay_ends import Connection, scripted_upstream

KEY = PLATFORM_KEY.encode()
USAGE = {"type": "message", "usage": {"input_tokens": 1, "output_tokens": 1}}


async def answered(folder: Path, script: Callable[[Connection], Awaitable[None]], **body: object) -> tuple[str, bytes]:
    """Send one request; return the answer's headers, in lower case, and its body."""
    async with scripted_upstream(script) as api, gateway_site(folder, sqlite_url(folder / "s.db"), api.url) as site:
        asked = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], **body}
        headers = {"x-api-key": site.token(await site.session(model=MODEL))}
        async with site.http.post(f"{site.url}/v1/messages", json=asked, headers=headers) as answer:
            assert answer.status == 200
            return "\n".join(f"{name}: {value}" for name, value in answer.headers.items()).lower(), await answer.read()


@pytest.mark.parametrize("cut", [1, 5, len(KEY) - 1])
@pytest.mark.parametrize("length_known", [True, False])
async def test_a_key_echoed_in_a_chunked_body_is_masked(tmp_path: Path, cut: int, length_known: bool) -> None:
    body = json.dumps({**USAGE, "echo": PLATFORM_KEY, "again": f"{PLATFORM_KEY[:7]} {PLATFORM_KEY}"}).encode()
    at = body.index(KEY) + cut

    async def script(connection: Connection) -> None:
        await connection.request()
        framing = b"Content-Length: %d" % len(body) if length_known else b"Transfer-Encoding: chunked"
        await connection.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + framing + b"\r\n\r\n")
        for piece in (body[:at], body[at:]):
            await (connection.write(piece) if length_known else connection.chunk(piece))
            await asyncio.sleep(0.05)  # so that the pieces are read separately
        if not length_known:
            await connection.chunk(b"")

    _, got = await answered(tmp_path, script)
    assert got == body.replace(KEY, b"*" * len(KEY))
    assert json.loads(got)["usage"] == USAGE["usage"]


async def test_a_key_echoed_in_a_stream_is_masked(tmp_path: Path) -> None:
    start = f'event: message_start\ndata: {{"message": {{"usage": {{"input_tokens": 1}}, "id": "{PLATFORM_KEY}"}}}}\n\n'
    delta = f'event: content_block_delta\ndata: {{"delta": {{"type": "text_delta", "text": "{PLATFORM_KEY}"}}}}\n\n'
    end = 'event: message_delta\ndata: {"usage": {"output_tokens": 3}}\n\nevent: message_stop\ndata: {}\n\n'
    stream = (start + delta + end).encode()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for begin in range(0, len(stream), 50):
            await connection.chunk(stream[begin : begin + 50])
        await connection.chunk(b"")

    _, got = await answered(tmp_path, script, stream=True)
    assert got == stream.replace(KEY, b"*" * len(KEY))


async def test_headers_with_side_effects_are_removed(tmp_path: Path) -> None:
    body = json.dumps(USAGE).encode()
    hostile = {
        "Location": "http://evil.test/", "X-Accel-Redirect": "/internal/secret", "WWW-Authenticate": "Basic realm=x",
        "X-Sendfile": "/etc/passwd", "Refresh": "0; url=http://evil.test", "Set-Cookie": "a=b", "Link": "<x>",
        "Clear-Site-Data": "*", "Strict-Transport-Security": "max-age=1", "Content-Security-Policy": "x",
        "Access-Control-Allow-Origin": "*", "Server": "x", "Via": "x", "X-Api-Key": PLATFORM_KEY,
        "Anthropic-Organization-Id": "org", "Request-Id": f"req {PLATFORM_KEY}",
    }  # fmt: skip
    kept = {"Anthropic-RateLimit-Requests-Limit": "50", "Content-Type": "application/json", "Cache-Control": "no-store"}

    async def script(connection: Connection) -> None:
        await connection.request()
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**hostile, **kept}.items())
        await connection.write(f"HTTP/1.1 200 OK\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    headers, _ = await answered(tmp_path, script)
    names = {line.partition(":")[0] for line in headers.splitlines()}
    assert not {name.lower() for name in hostile} & names
    assert {name.lower() for name in kept} <= names
    assert PLATFORM_KEY.lower() not in headers


async def test_the_api_receives_only_a_pseudonym(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []
    body = json.dumps(USAGE).encode()

    async def script(connection: Connection) -> None:
        while True:
            _, _, sent = await connection.request()
            asked.append(json.loads(sent))
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            await connection.write(head.encode() + body)

    async def told(site: Site, user_id: str, metadata: object) -> object:
        token = site.token(await site.session(user_id=user_id, model=MODEL))
        assert (await site.ask(token=token, metadata=metadata))[0] == 200
        return asked[-1]["metadata"]

    async with scripted_upstream(script) as api, gateway_site(tmp_path, sqlite_url(tmp_path / "s.db"), api.url) as site:
        first = await told(site, "ada@example.com", {"user_id": "ada@example.com", "note": "a secret"})
        again = await told(site, "ada@example.com", {"user_id": "bob"})
        other = await told(site, "bob", {"user_id": "ada@example.com"})
        assert isinstance(first, dict)
        assert set(first) == {"user_id"}
        assert len(first["user_id"]) == 64
        assert first == again != other
        await site.ask(token=site.token(await site.session(user_id="bob", model=MODEL)))
        assert "metadata" not in asked[-1], "a request without metadata gets none"
