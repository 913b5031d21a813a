"""The real `claude` CLI, driven by the Agent SDK, against the simulator."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import (
    ClaudeAgentOptions,
    ClaudeSDKClient,
    ResultMessage,
    StreamEvent,
    SystemMessage,
)

from support.simulator_fixtures import RunningSimulator

pytestmark = pytest.mark.timeout(180)
Connect = Callable[..., AbstractAsyncContextManager[ClaudeSDKClient]]


@pytest.fixture
def connect(simulator: RunningSimulator, tmp_path: Path) -> Connect:
    workspace = tmp_path / "workspace"
    workspace.mkdir()

    @asynccontextmanager
    async def connected(environment: dict[str, str] | None = None, **options: Any) -> AsyncIterator[ClaudeSDKClient]:
        settings: dict[str, Any] = {"tools": [], "setting_sources": [], "strict_mcp_config": True, "skills": []}
        given = ClaudeAgentOptions(
            cwd=workspace,
            system_prompt="You are Bob.",
            env=simulator.cli_environment(
                **{"CLAUDE_CONFIG_DIR": str(tmp_path / "config"), "CLAUDE_CODE_MAX_RETRIES": "3"} | (environment or {})
            ),
            **settings | options,
        )
        async with ClaudeSDKClient(given) as client:
            yield client

    return connected


async def turn(client: ClaudeSDKClient, prompt: str) -> tuple[ResultMessage, list[Any]]:
    await client.query(prompt)
    seen = [message async for message in client.receive_response()]
    assert isinstance(seen[-1], ResultMessage)
    return seen[-1], seen


async def test_later_turns_see_earlier_turns(simulator: RunningSimulator, connect: Connect) -> None:
    async with connect() as client:
        first, _ = await turn(client, "the word is heliotrope")
        second, _ = await turn(client, "[[recall 1]] [[recall system]]")
    assert first.result == 'Turn 1. You said: "the word is heliotrope".'
    assert second.result is not None
    assert second.result.startswith('Prompt 1 was: "the word is heliotrope".')
    assert "You are Bob." in second.result
    recorded = simulator.requests(first.session_id)
    assert len(recorded) == 2
    assert first.usage is not None
    assert first.usage["input_tokens"] == recorded[0]["answer"]["input_tokens"]
    assert first.usage["output_tokens"] == recorded[0]["answer"]["output_tokens"]


async def test_deltas_arrive_during_the_answer(connect: Connect) -> None:
    async with connect(include_partial_messages=True) as client:
        result, seen = await turn(client, "[[rate 200]] [[tokens 40]]")
    deltas = [
        message.event["delta"]["text"]
        for message in seen
        if isinstance(message, StreamEvent) and message.event.get("delta", {}).get("type") == "text_delta"
    ]
    assert len(deltas) == 10
    assert "".join(deltas) == result.result


async def test_tools_run_and_their_results_are_quoted(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "workspace" / "note.txt"
    write = json.dumps({"file_path": str(file), "content": "written by a tool"})
    tools = ["Write", "Bash"]
    async with connect(tools=tools, allowed_tools=tools) as client:
        result, _ = await turn(client, f'[[tool Write {write}]] [[tool Bash {{"command": "cat note.txt"}}]]')
        missing, _ = await turn(client, "[[tool WebFetch {}]]")
    assert file.read_text() == "written by a tool"
    assert result.result is not None
    assert "Write answered:" in result.result
    assert 'Bash answered: "written by a tool".' in result.result
    assert missing.result is not None
    assert "WebFetch is not offered" in missing.result


async def test_the_cli_retries_after_overload(simulator: RunningSimulator, connect: Connect) -> None:
    async with connect() as client:
        result, seen = await turn(client, "[[fault 529 times=2]] at last")
        after, _ = await turn(client, "next")
    assert (result.is_error, result.result) == (False, 'Turn 1. You said: "at last".')
    assert after.result == 'Turn 2. You said: "next".'
    retries = [m for m in seen if isinstance(m, SystemMessage) and m.subtype == "api_retry"]
    assert len(retries) == 2
    assert [each["answer"]["status"] for each in simulator.requests(result.session_id)] == [529, 529, 200, 200]


async def test_a_failed_turn_does_not_affect_the_next(connect: Connect) -> None:
    async with connect({"CLAUDE_CODE_MAX_RETRIES": "0"}) as client:
        failed, _ = await turn(client, "[[fault 500]]")
        next_one, _ = await turn(client, "still there?")
    assert failed.is_error
    assert not next_one.is_error
    assert next_one.result == 'Turn 2. You said: "still there?".'


@pytest.mark.parametrize("fault", ["cut after=3", "refuse"])
async def test_broken_connections_are_retried(simulator: RunningSimulator, connect: Connect, fault: str) -> None:
    async with connect() as client:
        result, _ = await turn(client, f"[[fault {fault} times=1]] [[rate 100]] whole again")
    assert (result.is_error, result.result) == (False, 'Turn 1. You said: "whole again".')
    assert len(simulator.requests(result.session_id)) == 2


async def test_interrupted_streams_are_closed(simulator: RunningSimulator, connect: Connect) -> None:
    async with connect(include_partial_messages=True) as client:
        await client.query("[[rate 0.1]] [[tokens 100]]")
        async for message in client.receive_messages():
            if isinstance(message, StreamEvent) and message.event.get("type") == "content_block_delta":
                break
        assert simulator.stats()["open_streams"] == 1
        await client.interrupt()
        async for message in client.receive_messages():
            if isinstance(message, ResultMessage):
                break
        async with asyncio.timeout(5):
            while simulator.stats()["open_streams"]:
                await asyncio.sleep(0.01)
        result, _ = await turn(client, "and now?")
    assert result.result == 'Turn 2. You said: "and now?".'


async def test_title_requests_of_the_cli_are_answered_in_their_schema(
    simulator: RunningSimulator, connect: Connect
) -> None:
    environment = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": ""}
    async with connect(environment, tools=None, strict_mcp_config=False) as client:
        result, _ = await turn(client, "[[fault 529 times=1]] name me")
        async with asyncio.timeout(20):
            while not (titles := [r for r in simulator.requests() if (r["body"]["output_config"] or {}).get("format")]):
                await asyncio.sleep(0.02)
    assert result.result == 'Turn 1. You said: "name me".'
    assert {each["answer"]["status"] for each in titles} == {200}
