"""The client of a running turn gets a structured error when its manager stops, as JSON or as an event."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from support.manager_server import deployed, frame, managing, settings_for


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stopping_manager_ends_its_turns_with_an_error(tmp_path: Path, stream: bool) -> None:
    async with deployed(tmp_path / "state", min_agents=1) as deployment:
        await deployment.warm(1)
        agent = deployment.agent
        begun = asyncio.Event()

        async def hang(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            if stream:
                await response.prepare(request)
                await response.write(frame("session", {"session_id": body["placement"]["session_id"]}))
            begun.set()
            await asyncio.Event().wait()
            raise AssertionError

        agent.answer = hang
        async with contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(
                managing(settings_for(tmp_path / "state", min_agents=1), deployment.backend)
            )

            async def ask() -> tuple[int, str, str]:
                body = {"user_id": "ada", "prompt": "hello", "stream": stream}
                async with deployment.http.post(f"{url}/v1/agent/chat", json=body) as answer:
                    return answer.status, answer.content_type, await answer.text()

            asking = asyncio.create_task(ask())
            await asyncio.wait_for(begun.wait(), 20)
        status, kind, text = await asking
        if stream:
            assert (status, kind) == (200, "text/event-stream")
            session, last = (part for part in text.split("\n\n") if part)
            assert session.startswith("event: session")
            assert last.startswith("event: error")
            error = json.loads(last.split("data: ")[1])["error"]
        else:
            assert (status, kind) == (503, "application/json")
            error = json.loads(text)["error"]
        assert error["type"] == "unavailable"
        assert "shut down before the request ended" in error["message"]
        assert error["retryable"] is False
        agent.answer = None
        assert (await deployment.chat())[0] == 200
