"""Traps of the Agent SDK that no other test covers, with the real CLI.

docs/CLAUDE_AGENT_SDK_INTEGRATION.md lists all traps. The tests share one agent, and each uses its own sessions.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ClaudeSDKError

from hypercore_agents.agent.claude.environment import MODEL_RETRIES
from hypercore_agents.agent.claude.options import bundled_cli
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.persistence.transcript_mirror import TranscriptMirror
from hypercore_agents.agent.sessions import restore
from hypercore_agents.api.ids import new_session_id
from support.agent_server import Agent, served_agent, stand_in_gateway, tool, turn
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(simulator_process: RunningSimulator, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Agent]:
    state = tmp_path_factory.mktemp("traps") / "agent"
    async with stand_in_gateway(simulator_process.url) as gateway, served_agent(gateway, state) as running:
        yield running


async def test_the_cli_retries_at_most_twice(agent: Agent, simulator: RunningSimulator) -> None:
    session_id = new_session_id()
    status, answer = await agent.post("/v1/agent/chat", turn("[[fault 529]]", session_id, timeout=60))
    assert (status, answer["error"]["type"]) == (502, "model_error")
    assert len(simulator.requests(session_id)) == 1 + MODEL_RETRIES


async def test_the_deadline_applies_during_a_retry_pause(agent: Agent) -> None:
    """The CLI waits for the time in Retry-After, unless that is minutes; then it fails at once."""
    session_id = new_session_id()
    await agent.chat(turn("[[say ready]]", session_id))
    status, answer = await agent.post(
        "/v1/agent/chat", turn("[[fault 429 retry_after=20]]", session_id, number=2, timeout=1.5)
    )
    assert (status, answer["error"]["type"]) == (504, "deadline_exceeded")
    assert (await agent.chat(turn("[[say on]]", session_id, number=3)))["content"] == "on"


@pytest.mark.parametrize("damage", ["removed", "garbage"])
async def test_a_corrupt_history_is_restored_from_the_store(agent: Agent, damage: str) -> None:
    session_id = new_session_id()
    options: dict[str, Any] = {"system_prompt": "You are terse."}
    await agent.chat(turn("remember the word cobalt", session_id, **options))
    assert await agent.server.enrolled().get(session_id).park()
    folder = SessionFolder.of(agent.state, session_id)
    transcript = folder.root / folder.transcript  # the session's user owns it, so tools can damage it
    if damage == "removed":
        shutil.rmtree(transcript.parent)
    else:
        transcript.write_text("{garbage\n" * 3)
    answer = await agent.chat(turn("[[recall 1]] [[recall system]]", session_id, number=2, **options))
    assert "cobalt" in answer["content"], answer
    assert "You are terse." in answer["content"]
    assert any("fetched from the store" in notice for notice in answer["notices"])


@pytest.mark.parametrize("damage", ["removed", "garbage"])
async def test_a_corrupt_history_is_restored_once_the_store_is_complete(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The store recovers after a turn was refused, and while another turn waits."""
    session_id = new_session_id()

    async def corrupt() -> None:
        assert await agent.server.enrolled().get(session_id).park()
        folder = SessionFolder.of(agent.state, session_id)
        transcript = folder.root / folder.transcript
        if damage == "removed":
            transcript.unlink()
        else:
            transcript.write_text("{garbage\n" * 3)

    await agent.chat(turn("hello", session_id))
    try:
        agent.gateway.store_works = False
        assert not (await agent.chat(turn("remember the word cobalt", session_id, number=2)))["durable"]
        await corrupt()
        monkeypatch.setattr(restore, "STORE_SECONDS", 0.1)
        status, answer = await agent.post("/v1/agent/chat", turn("[[recall 2]]", session_id, number=3))
        assert (status, answer["error"]["type"], answer["error"]["retryable"]) == (503, "unavailable", True)
        assert "does not have all of it yet" in answer["error"]["message"]
        monkeypatch.setattr(restore, "STORE_SECONDS", 25.0)
        waits, wait_until_stored = asyncio.Event(), TranscriptMirror.wait_until_stored

        async def watched(self: TranscriptMirror, seconds: float) -> bool:
            waits.set()
            return await wait_until_stored(self, seconds)

        monkeypatch.setattr(TranscriptMirror, "wait_until_stored", watched)
        waiting = asyncio.create_task(agent.chat(turn("[[recall 2]]", session_id, number=4, timeout=60)))
        await waits.wait()
    finally:
        agent.gateway.store_works = True
    answer = await waiting
    assert "cobalt" in answer["content"], answer
    assert any("fetched from the store" in notice for notice in answer["notices"])


async def answer_of(options: ClaudeAgentOptions) -> None:
    async with ClaudeSDKClient(options) as client:
        await client.query("hello")
        async for _ in client.receive_response():
            pass


@pytest.mark.root
async def test_bypass_permissions_gives_400_for_root(agent: Agent, simulator: RunningSimulator, tmp_path: Path) -> None:
    environment = simulator.cli_environment(CLAUDE_CONFIG_DIR=str(tmp_path))
    options = ClaudeAgentOptions(permission_mode="bypassPermissions", env=environment, cwd=tmp_path, setting_sources=[])
    with pytest.raises(ClaudeSDKError):
        await answer_of(options)
    status, body = await agent.post("/v1/agent/chat", turn("hello", permission_mode="bypassPermissions"))
    assert (status, body["error"]["details"]["field"]) == (400, "permission_mode")


async def test_commands_cannot_run_in_the_background(agent: Agent, simulator: RunningSimulator) -> None:
    session_id = new_session_id()
    answer = await agent.chat(turn(tool("Bash", command="echo ran", run_in_background=True), session_id))
    assert "InputValidationError" in answer["content"], answer
    (bash,) = (each for each in simulator.requests(session_id)[0]["body"]["tools"] if each["name"] == "Bash")
    assert "run_in_background" not in bash["input_schema"]["properties"]


async def test_a_session_survives_failed_starts(simulator: RunningSimulator, tmp_path: Path) -> None:
    broken, cli = tmp_path / "broken", tmp_path / "claude"
    cli.write_text(f'#!/bin/sh\n[ -e {broken} ] && exit 3\nexec {bundled_cli()} "$@"\n')
    cli.chmod(0o755)
    session_id = new_session_id()
    async with (
        stand_in_gateway(simulator.url) as gateway,
        served_agent(gateway, tmp_path / "agent", claude_cli_path=cli) as agent,
    ):
        await agent.chat(turn("remember the word cobalt", session_id))
        assert await agent.server.enrolled().get(session_id).park()
        broken.touch()
        status, answer = await agent.post("/v1/agent/chat", turn("hello", session_id, number=2))
        assert (status, answer["error"]["type"]) == (502, "agent_unreachable")
        broken.unlink()

        async def answered() -> Any:
            status, answer = await agent.post("/v1/agent/chat", turn("[[recall 1]]", session_id, number=3))
            assert status in (200, 503), answer  # the agent refuses turns until its next trial start succeeds
            return answer if status == 200 else None

        answer = await until(answered, seconds=60, pause=0.5)
        assert "cobalt" in answer["content"]
