"""Malformed input to every role over real sockets: a structured error with the right status, no effect, no stack trace.

Routes: the manager's chat and spawn, the agent's chat, the gateway's internal and model routes. Elsewhere: ids that are
unknown or another user's (`test_manager_foreign_users.py`, `test_gateway_internal_routes.py`), a full disk
(`tests/faults/test_full_disk.py`), invalid values in `.env` (`test_cli_operator.py`), the relay's own framing
(`tests/unit/test_relay_headers.py`), everything else that a schema allows (`test_openapi_contracts.py`).
"""

import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hypercore_agents.api.errors import ErrorBody
from hypercore_agents.api.internal import TRANSCRIPT_LINE_LIMIT
from hypercore_agents.http.strict import HEAD_LIMIT
from support.agent_server import served_agent, stand_in_gateway, turn
from support.gateway_server import MODEL, gateway_site
from support.manager_server import aiohttp_served, deployed
from support.raw_http import SECOND, SMUGGLING, post, send_bytes


@dataclass
class BodyRoute:
    """A route with a body. `begun`: returns the number of accepted requests; `unchecked`: fields that the API
    checks."""

    url: str
    path: str
    good: dict[str, Any]
    required: tuple[str, ...]
    begun: Callable[[], int]
    credential: str | None = None
    limit: int = 16 * 1024 * 1024
    unchecked: tuple[str, ...] = ()

    async def send(self, *headers: str, body: bytes = b"{}", path: str | None = None) -> bytes:
        more = [f"Authorization: Bearer {self.credential}"] if self.credential else []
        return await send_bytes(self.url, post(path or self.path, *more, *headers, body=body))

    async def refused(self, body: bytes) -> dict[str, Any]:
        """Send a body that must be rejected as a bad request; return the error."""
        return error_of(await self.send(f"Content-Length: {len(body)}", body=body), 400)


def error_of(answer: bytes, *statuses: int) -> dict[str, Any]:
    """Return the error of the only response."""
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", answer)) == 1, answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in statuses, answer
    assert b"content-type: application/json" in head.lower(), answer
    found = json.loads(body)
    found.pop("type", None)  # the model routes also have the Messages API's field
    error = ErrorBody.model_validate(found).error
    assert not error.retryable
    assert error.request_id.startswith("req_")
    assert "Traceback" not in error.message
    assert 'File "' not in error.message
    return error.model_dump()


@contextlib.asynccontextmanager
async def manager(folder: Path, path: str, good: dict[str, Any], required: tuple[str, ...]) -> AsyncIterator[BodyRoute]:
    async with deployed(folder / "state", min_agents=1, max_concurrent_requests=1000) as deployment:
        await deployment.warm(1)
        agent = deployment.agent

        def begun() -> int:
            return len(agent.chats) + len(deployment.host.sandboxes) - 1

        yield BodyRoute(deployment.url, path, good, required, begun)


@contextlib.asynccontextmanager
async def chat_of_manager(folder: Path) -> AsyncIterator[BodyRoute]:
    good = {
        "user_id": "ada", "prompt": "hi", "max_tokens": 5, "temperature": 0.5, "stream": False,
        "system_prompt": "be brief", "tools": ["Read"], "model": "claude-test", "output_schema": {"type": "object"},
    }  # fmt: skip
    async with manager(folder, "/v1/agent/chat", good, ("user_id", "prompt")) as route:
        yield route


@contextlib.asynccontextmanager
async def spawn_of_manager(folder: Path) -> AsyncIterator[BodyRoute]:
    good = {
        "user_id": "ada", "cores": 1, "memory": 512, "max_concurrent": 2, "timeout": 60, "tags": {"team": "blue"},
        "system_prompt": "be brief", "model": "claude-test", "allowed_tools": ["Read"], "max_budget_usd": 1.5,
        "mcp_servers": {"x": {"command": "x"}},
    }  # fmt: skip
    async with manager(folder, "/v1/agents/spawn", good, ("user_id",)) as route:
        yield route


@contextlib.asynccontextmanager
async def chat_of_agent(folder: Path) -> AsyncIterator[BodyRoute]:
    async with stand_in_gateway() as gateway, served_agent(gateway, folder / "agent") as agent:
        good = {**turn("hi"), "max_tokens": 5, "temperature": 0.5, "tools": ["Read"]}

        def begun() -> int:
            return agent.server.enrolled().counts()[0]

        required = ("user_id", "prompt", "placement")
        yield BodyRoute(agent.url, "/v1/agent/chat", good, required, begun, gateway.bearer)


@contextlib.asynccontextmanager
async def gateway(folder: Path, route: Callable[[Any, str, Callable[[], int]], BodyRoute]) -> AsyncIterator[BodyRoute]:
    asked = []

    async def api(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"usage": {"input_tokens": 1, "output_tokens": 1}})

    claude = web.Application()
    claude.router.add_route("*", "/{path:.*}", api)
    store = f"sqlite+aiosqlite:///{folder / 'store.db'}"
    async with aiohttp_served(claude) as url, gateway_site(folder, store, url) as site:
        yield route(site, await site.session(), lambda: len(asked))


@contextlib.asynccontextmanager
async def messages_of_gateway(folder: Path) -> AsyncIterator[BodyRoute]:
    good = {
        "model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], "stream": False,
        "temperature": 0.5, "system": "be brief", "tools": [], "metadata": {"user_id": "x"},
    }  # fmt: skip

    def route(site: Any, session_id: str, begun: Callable[[], int]) -> BodyRoute:
        required = ("model", "max_tokens", "messages")
        unchecked = ("temperature", "system", "metadata")
        return BodyRoute(site.url, "/v1/messages", good, required, begun, site.token(session_id), 32 * 2**20, unchecked)

    async with gateway(folder, route) as opened:
        yield opened


@contextlib.asynccontextmanager
async def transcript_of_gateway(folder: Path) -> AsyncIterator[BodyRoute]:
    good = {"generation": 1, "entries": [{"uuid": "u", "line": "{}"}]}

    def route(site: Any, session_id: str, begun: Callable[[], int]) -> BodyRoute:
        path = f"/internal/sessions/{session_id}/transcript"
        return BodyRoute(site.url, path, good, ("generation",), begun, site.agent_token(), 6 * TRANSCRIPT_LINE_LIMIT)

    async with gateway(folder, route) as opened:
        yield opened


ROUTES = [chat_of_manager, spawn_of_manager, chat_of_agent, messages_of_gateway, transcript_of_gateway]


@pytest.mark.parametrize("opened", ROUTES, ids=lambda route: route.__name__)
async def test_malformed_input_is_rejected_by_every_role(tmp_path: Path, opened: Any) -> None:
    async with opened(tmp_path) as route:
        await nothing_is_smuggled(route)
        await bad_bodies_are_refused_by_field(route)
        await huge_bodies_are_refused(route)
        assert route.begun() == 0


async def nothing_is_smuggled(route: BodyRoute) -> None:
    """Each framing is rejected with one structured error, and the connection ends: nothing else is read from it."""
    for name, (headers, sent) in SMUGGLING.items():
        try:
            error = error_of(await route.send(*headers, body=sent), 400)
        except AssertionError as failed:
            failed.add_note(name)
            raise
        assert error["type"] == "invalid_request", name
    for head, statuses in not_requests():
        error_of(await send_bytes(route.url, head + SECOND), *statuses)


def not_requests() -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Return malformed request heads, with the allowed statuses of their responses."""
    yield b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", (400,)
    yield b"GET /\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400,)
    yield b"GET http://other.test/ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400,)
    yield b"CONNECT other.test:443 HTTP/1.1\r\nHost: other.test:443\r\n\r\n", (400,)
    yield b"GET / HTTP/1.1\r\n folded: first\r\nHost: 127.0.0.1\r\n\r\n", (400,)
    yield b"GET / HTTP/1.1\nHost: 127.0.0.1\n\n", (400,)
    yield b"GET /" + b"a" * 2 * HEAD_LIMIT + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400,)
    yield b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 2 * HEAD_LIMIT + b"\r\n\r\n", (400,)
    yield b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * HEAD_LIMIT + b"\r\n", (400,)
    yield b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 8 * HEAD_LIMIT, (400,)  # without an end


async def bad_bodies_are_refused_by_field(route: BodyRoute) -> None:
    for body in (
        b"", b"{", b"nul", b"[]", b"null", b'"text"', b"7", b"{}{}", b"\xff\xfe{\x00}\x00", b'{"a": "\xff"}',
        b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"NaN",
    ):  # fmt: skip
        await route.refused(body)
    for body in (b"[" * 100_000, b"9" * 5000):
        assert "error parsing the body" not in (await route.refused(body))["message"], "the message explains the error"
    for name in route.required:
        error = await route.refused(encoded({key: value for key, value in route.good.items() if key != name}))
        assert field_of(error) == name, error
    for name, value in route.good.items():
        if name in route.unchecked:
            continue
        for wrong in (7, [[]]) if isinstance(value, dict | list | str) else ("a", {"a": 1}):
            error = await route.refused(encoded({**route.good, name: wrong}))
            assert field_of(error).partition(".")[0] == name, error
    unknown = await route.send(*length_of(more := encoded({**route.good, "colour": "red"})), body=more)
    assert "colour" in field_of(error_of(unknown, 400, 403))


async def huge_bodies_are_refused(route: BodyRoute) -> None:
    announced = await route.send(f"Content-Length: {route.limit + 1}", body=b"{")
    assert error_of(announced, 413)["type"] == "payload_too_large"
    piece = b"%x\r\n%b\r\n" % (2**20, b" " * 2**20)
    endless = await route.send("Transfer-Encoding: chunked", body=piece * (route.limit // 2**20 + 2))
    assert error_of(endless, 413)["details"] == {"limit_bytes": route.limit}


@pytest.mark.parametrize("opened", [chat_of_manager, messages_of_gateway], ids=lambda route: route.__name__)
async def test_a_prompt_of_a_megabyte_is_accepted(tmp_path: Path, opened: Any) -> None:
    """With a real CLI: `test_agent_turns.py`."""
    prompt = "ä " * (2**20 // 3)
    async with opened(tmp_path) as route:
        said = {"prompt": prompt} if "prompt" in route.good else {"messages": [{"role": "user", "content": prompt}]}
        body = encoded({**route.good, **said})
        answer = await route.send(*length_of(body), body=body)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert route.begun() == 1


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def length_of(body: bytes) -> tuple[str]:
    return (f"Content-Length: {len(body)}",)


def field_of(error: dict[str, Any]) -> str:
    return str((error["details"] or {}).get("field", ""))


UNKEEPABLE = {"a lone surrogate": "a\ud800b", "a null": "a\0b", "no number": float("nan"), "infinite": float("inf")}
"""Values that are valid JSON, or valid in Python's parser, but not in a store, a command line or another parser."""
PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "system_prompt": lambda odd: {"system_prompt": odd},
    "system_prompt.append": lambda odd: {"system_prompt": {"type": "preset", "append": odd}},
    "allowed_tools": lambda odd: {"allowed_tools": [odd]},
    "output_schema": lambda odd: {"output_schema": {"type": "object", "title": odd}},
    "output_schema.key": lambda odd: {"output_schema": {"type": "object", str(odd): 1}},
    "mcp_servers.command": lambda odd: {"mcp_servers": {"x": {"command": odd}}},
    "mcp_servers.args": lambda odd: {"mcp_servers": {"x": {"command": "x", "args": [odd]}}},
    "mcp_servers.key": lambda odd: {"mcp_servers": {str(odd): {"command": "x"}}},
    "agents.prompt": lambda odd: {"agents": {"a": {"description": "d", "prompt": odd}}},
    "agents.description": lambda odd: {"agents": {"a": {"description": odd, "prompt": "p"}}},
    "tags": lambda odd: {"tags": {"a": odd}},
    "max_budget_usd": lambda odd: {"max_budget_usd": odd},
    "temperature": lambda odd: {"temperature": odd},
}


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_text_that_no_store_can_hold_is_refused(tmp_path: Path, store_url: str) -> None:
    wrong = []
    async with deployed(tmp_path / "state", min_agents=1, database_url=store_url, max_agents_per_user=99) as deployment:
        await deployment.warm(1)
        for path, own in (("/v1/agent/chat", "temperature"), ("/v1/agents/spawn?wait=false", "tags")):
            for what, odd in UNKEEPABLE.items():
                for place, fill in PLACES.items():
                    if place in ("temperature", "tags") and place != own:
                        continue
                    if isinstance(odd, float) and place.endswith(".key"):
                        continue
                    said = {"user_id": "ada", **({"prompt": "hi"} if own == "temperature" else {}), **fill(odd)}
                    answer = b""
                    try:
                        answer = await send_bytes(
                            deployment.url, post(path, *length_of(encoded(said)), body=encoded(said))
                        )
                        assert field_of(error_of(answer, 400)).partition(".")[0] == place.partition(".")[0]
                    except (AssertionError, TimeoutError):
                        wrong.append((path, what, place, answer[:15], answer[-300:]))
    assert wrong == []
