"""Tool calls that need approval, with the real agent server, Agent SDK and Claude CLI, against the simulator."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hypercore_agents.agent.claude.approvals import Approvals
from hypercore_agents.agent.claude.process import ClaudeProcess
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.api.ids import new_session_id
from support.agent_server import Agent, Frame, StandInGateway, frames, served_agent, tool, turn
from support.simulator_fixtures import RunningSimulator
from support.waiting import until


def approval_turn(prompt: str, session_id: str, **more: Any) -> dict[str, Any]:
    return turn(prompt, session_id, tools=["Write", "Bash"], approval_tools=["Write"], **more)


def workspace(agent: Agent, session_id: str) -> Path:
    return SessionFolder.of(Path(agent.server.settings.agent_state_dir), session_id).workspace


@contextlib.asynccontextmanager
async def streamed(agent: Agent, body: dict[str, Any]) -> AsyncIterator[list[Frame]]:
    """Run a streamed turn during the block. The list gets its frames as they come, and has all of them afterwards."""
    seen: list[Frame] = []

    async def read() -> None:
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{agent.url}/v1/agent/chat", json=body | {"stream": True}, headers=agent.headers) as answer,
        ):
            assert answer.status == 200, await answer.text()
            async for frame in frames(answer):
                seen.append(frame)

    reading = asyncio.create_task(read())
    try:
        yield seen
        await asyncio.wait_for(reading, 30)
    finally:
        reading.cancel()


async def approval_request(seen: list[Frame]) -> dict[str, Any]:
    await until(lambda: any(frame.event == "approval_request" for frame in seen))
    return next(frame.data for frame in seen if frame.event == "approval_request")


def data_of(seen: list[Frame], event: str) -> list[dict[str, Any]]:
    return [frame.data for frame in seen if frame.event == event]


async def test_a_call_runs_only_after_it_is_allowed(agent: Agent) -> None:
    session_id = new_session_id()
    body = approval_turn(tool("Write", file_path="note.txt", content="approved"), session_id)
    async with streamed(agent, body) as seen:
        asked = await approval_request(seen)
        assert (asked["name"], asked["input"]["content"]) == ("Write", "approved")
        assert not (workspace(agent, session_id) / "note.txt").exists()
        status, listed = await agent.get(f"/v1/agent/session/{session_id}/approvals")
        assert (status, [waiting["approval_id"] for waiting in listed["approvals"]]) == (200, [asked["approval_id"]])
        path = f"/v1/agent/session/{session_id}/approvals/{asked['approval_id']}"
        assert (await agent.post(path, {"decision": "allow"}))[0] == 200
    assert data_of(seen, "approval_resolved") == [{"approval_id": asked["approval_id"], "decision": "allow"}]
    assert (workspace(agent, session_id) / "note.txt").read_text() == "approved"
    assert seen[-1].event == "result"
    status, late = await agent.post(path, {"decision": "deny"})
    assert (status, late["error"]["type"]) == (409, "conflict")
    assert (await agent.post(path.replace(asked["approval_id"], new_session_id()), {"decision": "deny"}))[0] == 404


async def test_an_approval_may_change_the_input(agent: Agent) -> None:
    session_id = new_session_id()
    body = approval_turn(tool("Write", file_path="note.txt", content="mine"), session_id)
    async with streamed(agent, body) as seen:
        asked = await approval_request(seen)
        changed = {"decision": "allow", "input": {**asked["input"], "content": "yours"}}
        path = f"/v1/agent/session/{session_id}/approvals/{asked['approval_id']}"
        assert (await agent.post(path, changed))[0] == 200
    assert (workspace(agent, session_id) / "note.txt").read_text() == "yours"


async def test_a_denied_call_does_not_run_and_its_reason_is_sent(agent: Agent, simulator: RunningSimulator) -> None:
    session_id = new_session_id()
    body = approval_turn(tool("Write", file_path="note.txt", content="no"), session_id)
    async with streamed(agent, body) as seen:
        asked = await approval_request(seen)
        path = f"/v1/agent/session/{session_id}/approvals/{asked['approval_id']}"
        assert (await agent.post(path, {"decision": "deny", "message": "not on a Friday"}))[0] == 200
    assert not (workspace(agent, session_id) / "note.txt").exists()
    assert "not on a Friday" in data_of(seen, "tool_result")[0]["content"]
    assert "not on a Friday" in str(simulator.requests(session_id)[-1]["body"]["messages"])


async def test_calls_of_other_tools_need_no_approval(agent: Agent) -> None:
    session_id = new_session_id()
    answer = await agent.chat(approval_turn(tool("Bash", command="echo free > free.txt"), session_id))
    assert answer["status"] == "completed"
    assert (workspace(agent, session_id) / "free.txt").exists()


async def test_an_unanswered_approval_expires(gateway: StandInGateway, tmp_path: Path) -> None:
    async with served_agent(gateway, tmp_path / "agent", approval_timeout=0.5) as agent:
        session_id = new_session_id()
        async with streamed(agent, approval_turn(tool("Write", file_path="note.txt", content="x"), session_id)) as seen:
            asked = await approval_request(seen)
        assert data_of(seen, "approval_resolved")[0]["decision"] == "approval_expired"
        assert "approval_expired" in data_of(seen, "tool_result")[0]["content"]
        assert not (workspace(agent, session_id) / "note.txt").exists()
        path = f"/v1/agent/session/{session_id}/approvals/{asked['approval_id']}"
        assert (await agent.post(path, {"decision": "allow"}))[0] == 409


async def test_an_interrupt_ends_the_approval_but_not_the_session(agent: Agent) -> None:
    session_id = new_session_id()
    async with streamed(agent, approval_turn(tool("Write", file_path="note.txt", content="x"), session_id)) as seen:
        await approval_request(seen)
        assert (await agent.post(f"/v1/agent/session/{session_id}/interrupt"))[1]["interrupted"]
    assert not (workspace(agent, session_id) / "note.txt").exists()
    assert seen[-1].data["status"] == "interrupted"
    assert (await agent.get(f"/v1/agent/session/{session_id}/approvals"))[1]["count"] == 0
    assert (await agent.chat(approval_turn("and now?", session_id, number=2)))["status"] == "completed"


async def test_an_interrupt_reaches_the_cli_before_the_denial_of_a_waiting_call(
    agent: Agent, simulator: RunningSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denial that arrives first is a tool result, which the CLI sends to the model: the turn would complete."""
    order: list[str] = []
    decide, interrupt = Approvals._decide, ClaudeProcess.interrupt

    async def note_decision(self: Approvals, *arguments: Any) -> dict[str, Any]:
        decision = await decide(self, *arguments)
        order.append("denied")
        return decision

    async def note_interrupt(self: ClaudeProcess) -> None:
        await interrupt(self)
        order.append("interrupted")

    monkeypatch.setattr(Approvals, "_decide", note_decision)
    monkeypatch.setattr(ClaudeProcess, "interrupt", note_interrupt)
    session_id = new_session_id()
    body = approval_turn(tool("Write", file_path="note.txt", content="x"), session_id)
    async with streamed(agent, body) as seen:
        await approval_request(seen)
        assert (await agent.post(f"/v1/agent/session/{session_id}/interrupt"))[1]["interrupted"]
    assert order[0] == "interrupted"
    assert data_of(seen, "approval_resolved")[0]["decision"] == "approval_expired"
    assert seen[-1].data["status"] == "interrupted"
    assert len(simulator.requests(session_id)) == 1


async def test_approvals_beyond_the_limit_are_denied_at_once(gateway: StandInGateway, tmp_path: Path) -> None:
    async with served_agent(gateway, tmp_path / "agent", live_sessions=4) as agent:  # a quarter: one may wait
        first, second = new_session_id(), new_session_id()
        prompt = tool("Write", file_path="note.txt", content="x")
        async with streamed(agent, approval_turn(prompt, first)) as seen:
            asked = await approval_request(seen)
            async with streamed(agent, approval_turn(prompt, second)) as other:
                pass
            assert data_of(other, "approval_request") == []
            assert "waiting approval requests" in data_of(other, "tool_result")[0]["content"]
            path = f"/v1/agent/session/{first}/approvals/{asked['approval_id']}"
            assert (await agent.post(path, {"decision": "allow"}))[0] == 200
        assert (workspace(agent, first) / "note.txt").exists()


async def test_a_session_that_waits_for_approval_is_never_parked(gateway: StandInGateway, tmp_path: Path) -> None:
    """Neither for a waiting turn, nor for its size or its idle time: it has a turn."""
    pressing: dict[str, Any] = {"live_sessions": 1, "park_after": 0.02, "recycle_mb": 100, "room_timeout": 0.5}
    async with served_agent(gateway, tmp_path / "agent", **pressing) as agent:
        session_id = new_session_id()
        async with streamed(agent, approval_turn(tool("Write", file_path="note.txt", content="x"), session_id)) as seen:
            asked = await approval_request(seen)
            pid = agent.cli_pid(session_id)
            status, error = await agent.post("/v1/agent/chat", turn("is there capacity?", user_id="bob"))
            assert (status, error["error"]["type"]) == (503, "at_capacity")
            assert agent.cli_pid(session_id) == pid
            path = f"/v1/agent/session/{session_id}/approvals/{asked['approval_id']}"
            assert (await agent.post(path, {"decision": "allow"}))[0] == 200
        assert (workspace(agent, session_id) / "note.txt").exists()
        await until(lambda: agent.server.enrolled().counts()[1] == 0)  # idle now, it is parked at once


async def test_an_invalid_decision_is_refused(agent: Agent) -> None:
    session_id = new_session_id()
    async with streamed(agent, approval_turn(tool("Write", file_path="note.txt", content="x"), session_id)) as seen:
        asked = await approval_request(seen)
        path = f"/v1/agent/session/{session_id}/approvals/{asked['approval_id']}"
        for wrong in ({"decision": "maybe"}, {"decision": "deny", "input": {}}, {"decision": "allow", "message": "x"}):
            assert (await agent.post(path, wrong))[0] == 400
        assert (await agent.post(path, {"decision": "deny"}))[0] == 200
