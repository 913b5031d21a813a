"""Errors and notices for requests that the real Claude CLI rejects or does not fulfil, and their `retryable`."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.agent.claude import environment
from hypercore_agents.api.ids import new_session_id
from support.agent_server import MCP_SERVER, Agent, launched, served_agent, stand_in_gateway, tool, turn
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]
REFUSED = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
"""A schema that only the CLI rejects: its pattern is not valid ECMAScript."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(simulator_process: RunningSimulator, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Agent]:
    state = tmp_path_factory.mktemp("refusals") / "agent"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "MODEL_RETRIES", 0)  # avoid the pauses of retries
        async with stand_in_gateway(simulator_process.url) as gateway, served_agent(gateway, state) as running:
            yield running


async def failed_turn(
    agent: Agent, prompt: str, session_id: str | None = None, **more: Any
) -> tuple[int, dict[str, Any]]:
    status, body = await agent.post("/v1/agent/chat", turn(prompt, session_id, **more))
    assert status != 200, body
    return status, body["error"]


async def test_an_option_rejected_by_the_cli_gives_400_with_its_field(agent: Agent) -> None:
    status, error = await failed_turn(agent, "hello", output_schema=REFUSED)
    assert (status, error["type"], error["retryable"]) == (400, "invalid_request", False)
    assert error["details"] == {"field": "output_schema"}
    assert "Invalid regular expression" in error["message"]


async def test_an_overlong_prompt_gives_400_without_a_retry(agent: Agent) -> None:
    try:
        for status, words in ((400, "prompt is too long: 210000 tokens > 200000 maximum"), (413, "too large")):
            agent.gateway.refuse_models = (status, words)
            answered, error = await failed_turn(agent, "hello")
            assert (answered, error["type"], error["retryable"]) == (400, "invalid_request", False)
            assert (error["details"]["field"], error["details"]["cause"]) == ("prompt", "prompt_too_long")
    finally:
        agent.gateway.refuse_models = None


async def test_a_text_answer_to_an_output_schema_is_an_error(agent: Agent) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    session_id = new_session_id()
    status, error = await failed_turn(agent, "[[say in words]]", session_id, output_schema=schema, tools=[])
    assert (status, error["type"], error["retryable"]) == (502, "model_error", False)
    assert error["details"]["field"] == "output_schema"
    assert "in text" in error["message"]
    plain = await agent.chat(turn("hello", output_schema=schema, tools=[]))
    assert set(plain["output"]) <= {"a"}, "the simulator answers a plain prompt by the schema"
    fits = await agent.chat(turn(tool("StructuredOutput", a="x"), session_id, number=2, output_schema=schema, tools=[]))
    assert fits["output"] == {"a": "x"}


async def test_a_failure_after_output_is_not_retryable(agent: Agent) -> None:
    session_id = new_session_id()
    status, error = await failed_turn(agent, "[[fault 529]]", session_id)
    assert (status, error["type"], error["retryable"]) == (502, "model_error", True), "there was no output yet"
    ran = tool("Bash", command="true") + "[[fault 529]]"
    status, error = await failed_turn(agent, ran, session_id, number=2)
    assert (status, error["type"], error["retryable"]) == (502, "model_error", False)
    assert error["details"] == {"api_status": 529, "acted": True, "session_id": session_id, "turn": 2}
    assert "do not repeat it" in error["message"]
    text_then_cut = "[[rate 40]] [[fault cut after=8]] one two three four five six seven"
    last = (await agent.stream(turn(text_then_cut, session_id, number=3, stream=True)))[-1]
    assert (last.event, last.data["error"]["retryable"]) == ("error", False)
    cut = tool("Bash", command="true") + "[[fault cut after=2]]"
    status, error = await failed_turn(agent, cut, session_id, number=4)
    assert (status, error["retryable"], error["details"]["acted"]) == (502, False, True), "also without streaming"


async def test_a_timeout_after_a_tool_call_is_not_retryable(agent: Agent) -> None:
    session_id = new_session_id()
    await agent.chat(turn("hello", session_id))
    status, error = await failed_turn(
        agent, tool("Bash", command="true") + "[[ttft 60]]", session_id, number=2, timeout=4
    )
    assert (status, error["type"], error["retryable"]) == (504, "deadline_exceeded", False)


async def test_failed_mcp_servers_are_in_the_notices_after_a_bounded_wait(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "MCP_START_SECONDS", 2.0)
    notes = tmp_path / "notes.py"
    notes.write_text(MCP_SERVER)
    servers = {
        "gone": {"command": "/no/such"},
        "silent": {"command": "/bin/sleep", "args": ["1000"]},
        "notes": {"command": sys.executable, "args": ["-I", "-S", str(notes)]},
    }
    answer = await agent.chat(turn("hello", mcp_servers=servers, timeout=60))
    notices = [notice for notice in answer["notices"] if "MCP server" in notice]
    assert sorted(notice.split()[5] for notice in notices) == ["gone", "silent"], notices
    assert any("ENOENT" in notice for notice in notices)
    assert any("timed out after 2000ms" in notice for notice in notices)


async def test_no_notice_reports_a_missing_agent_tool(agent: Agent, simulator: RunningSimulator) -> None:
    session_id = new_session_id()
    answer = await agent.chat(turn("hello", session_id, agents={"rev": {"description": "d", "prompt": "p"}}))
    assert answer["notices"] == []
    assert "Agent" in {each["name"] for each in simulator.requests(session_id)[0]["body"]["tools"]}


async def test_an_unreachable_gateway_is_named(agent: Agent) -> None:
    session_id = new_session_id()
    await agent.chat(turn("hello", session_id))
    try:
        agent.gateway.cuts_models, agent.gateway.usage_works = True, False
        status, error = await failed_turn(agent, "hello", session_id, number=2)
        assert (status, error["type"], error["retryable"]) == (503, "unavailable", True)
        assert "gateway" in error["message"]
        agent.gateway.usage_works = True
        status, error = await failed_turn(agent, "hello", session_id, number=3)
        assert (status, error["type"]) == (502, "model_error")
        assert "Claude API or the gateway" in error["message"]
    finally:
        agent.gateway.cuts_models, agent.gateway.usage_works = False, True


@pytest.mark.root
async def test_rejected_options_are_no_longer_prewarmed(simulator_process: RunningSimulator, tmp_path: Path) -> None:
    with launched(tmp_path / "agent") as launcher:
        async with (
            stand_in_gateway(simulator_process.url) as gateway,
            served_agent(gateway, tmp_path / "agent", launcher, spares=1) as agent,
        ):
            prewarmed = agent.server.enrolled().prewarmed
            await until(lambda: prewarmed.count == 1 and prewarmed.pids() != [])
            for user in ("ada", "bob", "cleo"):
                status, error = await failed_turn(agent, "hello", user_id=user, output_schema=REFUSED)
                assert (status, error["details"]) == (400, {"field": "output_schema"})
            await until(lambda: prewarmed.gave_up)
            assert prewarmed.count == 0
