"""Request bodies that cost their sender nothing do not block others, at the gateway and at the manager.

Each test has an attacker with an ordinary user's rights, or none, and a victim that sends requests at the same time.
"""

import asyncio
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from joserfc import jwt
from joserfc.jwk import OctKey

from hypercore_agents.gateway import model, request_rules
from hypercore_agents.gateway.bodies import Bodies
from hypercore_agents.gateway.request_rules import ModelRequest
from hypercore_agents.manager.http.auth import Caller
from hypercore_agents.manager.http.bodies import holder_of
from hypercore_agents.store.database import sqlite_url
from support.gateway_server import Site, gateway_site
from support.manager_server import Deployment, deployed
from support.raw_http import send_bytes
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

SECRET = "a-secret-of-more-than-thirty-two-bytes"
MB = 1024 * 1024
MANY_VALUES = b'{"model":"claude-sonnet-5","max_tokens":5,"messages":[{"role":"user","content":[' + b"{}," * (9 * MB)
HOSTILE_BODIES = {
    "many objects": MANY_VALUES + b"{}]}]}",
    "many keys": b"{" + b",".join(b'"%d":0' % number for number in range(300_000)) + b"}",
    "deep lists": b"[" * (20 * MB),
    "many numbers": b'{"messages":[' + b"1," * (10 * MB) + b"1]}",
}


@pytest_asyncio.fixture
async def site(tmp_path: Path, simulator: RunningSimulator) -> AsyncIterator[Site]:
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "store.db"), simulator.url, model_bodies_mb=64) as site:
        yield site


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state", min_agents=1, enable_auth=True, jwt_secret=SECRET) as running:
        yield running


def bodies_of(site: Site) -> Bodies:
    bodies = vars(vars(site.app)["_model"])["_app"]._bodies
    assert isinstance(bodies, Bodies)
    return bodies


def bearer(user_id: str) -> str:
    claims = {"sub": user_id, "exp": int(time.time()) + 600}
    return f"Bearer {jwt.encode({'alg': 'HS256'}, claims, OctKey.import_key(SECRET))}"


def message(system: str, prompt: str = "hi", **more: Any) -> bytes:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "claude-sonnet-5", "max_tokens": 100, "system": system, "messages": messages, **more}
    return json.dumps(body).encode()


async def large(url: str, token: str, body: bytes) -> bytes:
    """Send a model request as bytes; return the answer, empty if the connection was cut."""
    head = f"POST /v1/messages HTTP/1.1\r\nHost: a\r\nConnection: close\r\nx-api-key: {token}\r\n"
    return await send_bytes(url, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, seconds=50)


@contextlib.asynccontextmanager
async def half_sent(
    url: str, path: str, length: int, sent: bytes, *headers: str, address: str = "127.0.0.1"
) -> AsyncIterator[asyncio.StreamReader]:
    """Announce a body of `length` bytes from a client's address and send only a part of it."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, local_addr=(address, 0))
    try:
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
        writer.write("\r\n".join([*lines, f"Content-Length: {length}"]).encode() + b"\r\n\r\n" + sent)
        yield reader
    finally:
        writer.close()


@pytest.mark.parametrize("kind", HOSTILE_BODIES)
async def test_the_gateway_does_not_parse_bodies_with_too_many_values(
    site: Site, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    real = vars(request_rules)["from_json"]

    def parse(raw: bytes, **more: Any) -> Any:
        parsed.append(len(raw))
        return real(raw, **more)

    monkeypatch.setattr(request_rules, "from_json", parse)
    attacker, victim = site.token(await site.session(user_id="mal")), site.token(await site.session(user_id="ada"))

    attacks = asyncio.gather(*[large(site.url, attacker, HOSTILE_BODIES[kind]) for _ in range(2)])
    assert (await site.ask(token=victim))[0] == 200
    for answer in await attacks:
        assert not answer or b"values" in answer, answer  # empty if the server closed while the client was sending
    assert max(parsed) < MB, "only the victim's body was parsed"
    assert bodies_of(site).budget.held == 0


async def test_others_are_served_while_a_large_body_is_parsed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    real = vars(model)["apply_rules"]

    def apply_rules(raw: bytes, *arguments: Any, **more: Any) -> ModelRequest:
        if len(raw) > MB:
            begun.set()
            assert go_on.wait(60), "the victim is served meanwhile"
        request: ModelRequest = real(raw, *arguments, **more)
        return request

    monkeypatch.setattr(model, "apply_rules", apply_rules)
    attacker, victim = site.token(await site.session(user_id="mal")), site.token(await site.session(user_id="ada"))
    attack = asyncio.create_task(large(site.url, attacker, message("x" * 2 * MB)))
    try:
        await until(begun.is_set)
        assert (await site.ask(token=victim))[0] == 200
        assert not attack.done()
    finally:
        go_on.set()
    assert (await attack).startswith(b"HTTP/1.1 200 ")


async def test_half_sent_bodies_leave_memory_for_others(site: Site) -> None:
    """The budget is 64 MB: a user gets half of it with any number of sessions and connections."""
    sessions = [site.token(await site.session(user_id="mal")) for _ in range(3)]
    victim = site.token(await site.session(user_id="ada"))
    async with contextlib.AsyncExitStack() as stack:
        for token in sessions:
            for _ in range(4):
                await stack.enter_async_context(
                    half_sent(site.url, "/v1/messages", 16 * MB, b" " * MB, f"x-api-key: {token}")
                )
        budget = bodies_of(site).budget
        await until(lambda: budget.held >= 32 * MB)
        assert (await large(site.url, victim, message("x" * 20 * MB))).startswith(b"HTTP/1.1 200 ")
        assert budget.held == 32 * MB
    await until(lambda: budget.held == 0)


async def test_chunked_bodies_count_as_they_arrive(site: Site) -> None:
    token = site.token(await site.session(user_id="mal"))
    victim = site.token(await site.session(user_id="ada"))
    budget = bodies_of(site).budget
    where = urlsplit(site.url)
    head = f"POST /v1/messages HTTP/1.1\r\nHost: a\r\nx-api-key: {token}\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b" " * MB + b"\r\n"
    async with contextlib.AsyncExitStack() as stack:
        readers = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            stack.callback(writer.close)
            writer.write(head.encode() + chunk * 15)
            readers.append(reader)
        heads = [asyncio.create_task(reader.readuntil(b"\r\n\r\n")) for reader in readers]
        (refused, *_), _ = await asyncio.wait(heads, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert refused.result().startswith(b"HTTP/1.1 429 "), refused
        stack.callback(lambda: [head.cancel() for head in heads])
        assert budget.held <= 32 * MB
        assert (await site.ask(token=victim))[0] == 200
    await until(lambda: budget.held == 0)


async def test_a_body_is_freed_while_its_answer_streams(site: Site) -> None:
    token = site.token(await site.session())
    body = message("x" * 8 * MB, "[[ttft 0]] [[rate 5]] [[say one two three four five six]]", stream=True)
    async with site.http.post(f"{site.url}/v1/messages", data=io.BytesIO(body), headers={"x-api-key": token}) as answer:
        assert answer.status == 200
        await answer.content.readline()
        assert bodies_of(site).budget.held == 0
        assert b"message_stop" in await answer.read()


async def test_the_gateway_rejects_compressed_bodies(site: Site) -> None:
    token = site.token(await site.session())
    for coding in ("gzip", "deflate", "br", "gzip, identity"):
        status, answer, _ = await site.ask(token=token, headers={"content-encoding": coding})
        assert (status, answer["error"]["details"]["field"]) == (400, "Content-Encoding")


async def test_internal_requests_are_authenticated_before_their_body(site: Site) -> None:
    for path in ("/internal/heartbeat", "/internal/session-tokens", f"/internal/sessions/{'0' * 8}/transcript"):
        async with half_sent(site.url, path, 60_000, b"{") as reader:
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
            assert answer.startswith(b"HTTP/1.1 401 "), (path, answer)


@pytest.mark.parametrize("path", ["/v1/agent/chat", "/v1/agents/spawn", "/v1/pool/roll", "/v1/nothing"])
async def test_unauthenticated_bodies_are_not_read(guarded: Deployment, path: str) -> None:
    """FastAPI would read and parse the whole body before authentication."""
    async with half_sent(guarded.url, path, 15 * MB, MANY_VALUES[: MB // 2]) as reader:
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        assert answer.startswith(b"HTTP/1.1 401 "), answer


async def test_the_manager_does_not_parse_bodies_with_too_many_values(
    guarded: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    real = json.loads

    def parse(text: Any, **more: Any) -> Any:
        parsed.append(len(text))
        return real(text, **more)

    monkeypatch.setattr(json, "loads", parse)
    declared = f"Content-Type: application/json\r\nAuthorization: {bearer('mal')}\r\nConnection: close"
    for body in (MANY_VALUES[: 15 * MB], b"[" * (15 * MB), b'{"a":' * (2 * MB)):
        head = f"POST /v1/agent/chat HTTP/1.1\r\nHost: 127.0.0.1\r\n{declared}\r\nContent-Length: {len(body)}\r\n\r\n"
        answer = await send_bytes(guarded.url, head.encode() + body)
        assert not answer or b"values" in answer, answer  # empty if the server closed while the client was sending
    monkeypatch.undo()
    assert max(parsed, default=0) < MB
    status, _ = await guarded.call("GET", "/v1/agent/sessions", headers={"authorization": bearer("ada")})
    assert status == 200


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [
        ("/v1/agent/chat", 17 * MB, 413),
        ("/v1/pool/roll", 5 * MB, 413),
        ("/v1/agent/session/x/interrupt", 70_000, 413),
        ("/v1/nothing", 70_000, 413),
    ],
)
async def test_routes_limit_their_bodies(guarded: Deployment, path: str, length: int, status: int) -> None:
    async with half_sent(guarded.url, path, length, b"{", f"Authorization: {bearer('ada')}") as reader:
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer


async def test_half_sent_bodies_leave_the_manager_memory_for_others(guarded: Deployment) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(12):  # of 15 MB each: more than half of the budget of 256 MB
            reader = await stack.enter_async_context(
                half_sent(guarded.url, "/v1/agent/chat", 15 * MB, b"{", f"Authorization: {bearer('mal')}")
            )
        refused = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        assert refused.startswith(b"HTTP/1.1 429 "), refused
        body = {"user_id": "ada", "prompt": "x" * 500_000}
        headers = {"authorization": bearer("ada")}
        status, answer = await guarded.call("POST", "/v1/agent/chat", body, headers=headers)
        assert status in (200, 503), answer  # 503: the pool's agent may still be starting


@pytest.mark.parametrize("authenticated", [False, True])
async def test_half_sent_bodies_do_not_block_other_clients(tmp_path: Path, authenticated: bool) -> None:
    """Neither client is a user: both are admins, by their credential or because authentication is off."""
    settings: dict[str, Any] = {"enable_auth": True, "jwt_secret": SECRET} if authenticated else {}
    claims = {"scope": "admin", "exp": int(time.time()) + 600}
    admin = f"Authorization: Bearer {jwt.encode({'alg': 'HS256'}, claims, OctKey.import_key(SECRET))}"
    async with deployed(tmp_path / "state", min_agents=1, **settings) as running, contextlib.AsyncExitStack() as stack:
        for _ in range(12):  # of 15 MB each: more than half of the budget of 256 MB
            reader = await stack.enter_async_context(
                half_sent(running.url, "/v1/agent/chat", 15 * MB, b"{", admin, address="127.0.0.2")
            )
        refused = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        assert refused.startswith(b"HTTP/1.1 429 "), refused
        body = b"{" + b" " * (15 * MB - 1)
        other = await stack.enter_async_context(
            half_sent(running.url, "/v1/agent/chat", len(body), body, admin, address="127.0.0.3")
        )
        answer = await asyncio.wait_for(other.readuntil(b"\r\n\r\n"), 30)
        assert answer.startswith(b"HTTP/1.1 400 "), answer  # read and parsed, and not JSON


@pytest.mark.parametrize(
    ("caller", "address", "holder"),
    [
        (Caller("user", "ada"), "192.0.2.7", "user ada"),
        (Caller("admin"), "192.0.2.7", "admin at 192.0.2.7"),
        (Caller("admin"), "::ffff:192.0.2.7", "admin at 192.0.2.7"),
        (Caller("metrics"), "2001:db8:1:2:3:4:5:6", "metrics at 2001:db8:1:2::"),
        (Caller("admin"), "fe80::1%eth0", "admin at fe80::"),
        (Caller("admin"), None, "admin"),
    ],
)
def test_bodies_count_by_user_or_by_address(caller: Caller, address: str | None, holder: str) -> None:
    assert holder_of(caller, {"client": None if address is None else (address, 1)}) == holder


async def test_the_manager_rejects_compressed_bodies(guarded: Deployment) -> None:
    headers = {"authorization": bearer("ada"), "content-encoding": "gzip"}
    status, answer = await guarded.call("POST", "/v1/agent/chat", {"user_id": "ada", "prompt": "x"}, headers=headers)
    assert (status, answer["error"]["details"]["field"]) == (400, "Content-Encoding")
