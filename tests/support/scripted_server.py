"""A server on loopback that returns scripted answers, for tests of the client."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from support.manager_server import frame

SESSION = "6cd00148-e322-44d0-9f2e-9977f67c5458"
RESULT = {
    "session_id": SESSION, "agent_id": "agent-1", "content": "one two", "status": "completed", "turn": 1,
    "tools": False, "a_later_field": 1,
    "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3, "cost_usd": 0.5},
}  # fmt: skip
STARTED = {"session_id": SESSION, "agent_id": "agent-1", "turn": 1, "tools": False, "notices": []}
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Returns the answers in `script` in order and records the requests."""

    def __init__(self) -> None:
        self.script: list[Answer] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.url = ""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        self.requests.append((f"{request.method} {request.path_qs}", dict(request.headers), json.loads(text or "null")))
        return await self.script.pop(0)(request)


def says(body: Any, status: int = 200, **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return answer


def fails(type_: str, status: int, *, retryable: bool, **headers: str) -> Answer:
    error = {"type": type_, "message": "no", "request_id": "req-7", "retryable": retryable, "details": {"field": "x"}}
    return says({"error": error}, status, **headers)


def streams(*frames: bytes, cut: bool = False) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in frames:
            await response.write(piece)
        if cut:
            await asyncio.sleep(0)
            assert request.transport is not None
            request.transport.close()
        return response

    return answer


def numbered(number: int, name: str, data: Any) -> bytes:
    return f"id: 1.{number}\n".encode() + frame(name, data)
