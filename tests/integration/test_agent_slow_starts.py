"""Slow starts on a busy host: they are not killed, and a start whose turn has ended is used for another turn."""

import asyncio
import contextlib
import shlex
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk._internal.query import Query

from hypercore_agents.agent.claude.options import bundled_cli
from hypercore_agents.agent.claude.process import ClaudeProcess
from hypercore_agents.api.internal import SessionToken
from support.agent_server import Agent, StandInGateway, launched, served_agent, stand_in_gateway, turn
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

_SLOW_CLI = """#!/bin/sh
echo start >> {count} 2>/dev/null
/usr/bin/env python3 -S -c 'import time
while time.process_time() < {seconds}: pass'
exec {cli} "$@"
"""


def slow_cli(folder: Path, seconds: float) -> tuple[Path, Path]:
    """Write a CLI wrapper that first computes for `seconds`; return it, and the file that counts its starts."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    count, cli = folder / "count", folder / "claude"
    count.write_text("")
    count.chmod(0o666)
    cli.write_text(_SLOW_CLI.format(count=count, seconds=seconds, cli=shlex.quote(str(bundled_cli()))))
    cli.chmod(cli.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return cli, count


async def test_a_start_with_progress_has_no_time_limit(gateway: StandInGateway, tmp_path: Path) -> None:
    cli, count = slow_cli(tmp_path / "bin", seconds=1.5)
    async with served_agent(gateway, tmp_path / "agent", claude_cli_path=cli, cli_start_timeout=1) as agent:
        assert (await agent.chat(turn("[[say here]]")))["content"] == "here"
    assert count.read_text() == "start\n"


async def test_the_sdks_start_timeout_does_not_apply(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Query.__init__

    def with_short_timeout(self: Query, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **{**more, "initialize_timeout": 0.3})  # instead of 60 s

    monkeypatch.setattr(Query, "__init__", with_short_timeout)
    cli, _ = slow_cli(tmp_path / "bin", seconds=1.5)
    async with served_agent(gateway, tmp_path / "agent", claude_cli_path=cli) as agent:
        assert (await agent.chat(turn("[[say here]]")))["content"] == "here"


async def test_the_next_turn_uses_the_start_of_a_timed_out_turn(gateway: StandInGateway, tmp_path: Path) -> None:
    cli, count = slow_cli(tmp_path / "bin", seconds=1.5)
    async with served_agent(gateway, tmp_path / "agent", claude_cli_path=cli, live_sessions=1) as agent:
        body = turn("[[say too late]]", timeout=1)
        status, error = await agent.post("/v1/agent/chat", body)
        assert (status, error["error"]["type"]) == (504, "deadline_exceeded")
        answer = await agent.chat(turn("[[say now]]", body["session_id"], number=2))
        assert answer["content"] == "now"
        assert count.read_text() == "start\n"
        await agent.delete(f"/v1/agent/session/{body['session_id']}")
        await until(lambda: agent.server.enrolled().capacity.used == 0)


async def test_a_failed_start_releases_its_slot_after_its_turn(gateway: StandInGateway, tmp_path: Path) -> None:
    cli, _ = slow_cli(tmp_path / "bin", seconds=1.5)
    cli.write_text(cli.read_text().partition("exec")[0] + "exit 3\n")
    async with served_agent(gateway, tmp_path / "agent", claude_cli_path=cli, live_sessions=1) as agent:
        assert (await agent.post("/v1/agent/chat", turn("hi", timeout=1)))[0] == 504
        assert agent.server.enrolled().capacity.used == 1
        await until(lambda: agent.server.enrolled().capacity.used == 0)


async def test_a_deleted_sessions_start_becomes_a_prewarmed_cli(simulator: RunningSimulator, tmp_path: Path) -> None:
    async with _agent_with_slow_starts(simulator, tmp_path) as agent:
        await _reuse_start_of_deleted_session(agent)


async def test_a_reused_start_has_no_files_of_the_deleted_session(simulator: RunningSimulator, tmp_path: Path) -> None:
    async with _agent_with_slow_starts(simulator, tmp_path) as agent:
        sessions = agent.server.enrolled()
        await until(sessions.prewarmed.pids)
        sessions.prewarmed._delayed = True  # no prewarmed CLI starts by itself
        await agent.chat(turn("[[say taken]]"))
        body = turn("[[say never]]", timeout=600)
        session_id = body["session_id"]
        request = asyncio.create_task(agent.post("/v1/agent/chat", body))
        await until(lambda: session_id in sessions._sessions and sessions.get(session_id).status.connecting)
        await agent.post(f"/v1/agent/session/{session_id}/interrupt")  # the start continues
        await request
        assert (await _put(agent, session_id, "secret"))["workspace_durable"]
        await agent.delete(f"/v1/agent/session/{session_id}")
        await until(lambda: not sessions._removal.in_progress)
        next_turn = turn("[[say next]]", user_id="bob")
        assert (await agent.chat(next_turn))["content"] == "next"
        assert await _listed(agent, next_turn["session_id"]) == []


async def test_a_file_uploaded_before_the_first_turn_remains(
    simulator: RunningSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _agent_with_prewarmed_cli(simulator, tmp_path) as agent:
        sessions, began = agent.server.enrolled(), asyncio.Event()
        session_token = sessions._turn_context.gateway.session_token

        async def late_token(session_id: str, generation: int) -> SessionToken:
            await began.wait()
            return await session_token(session_id, generation)

        monkeypatch.setattr(sessions._turn_context.gateway, "session_token", late_token)
        body = turn("[[say here]]", timeout=600)
        request = asyncio.create_task(agent.chat(body))
        await until(lambda: body["session_id"] in sessions._sessions)
        await _put(agent, body["session_id"], "note")
        began.set()
        assert (await request)["content"] == "here"
        assert await _listed(agent, body["session_id"]) == ["note"]


async def test_an_interrupted_assignment_ends_the_prewarmed_cli(
    simulator: RunningSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = asyncio.Event()

    async def change_endlessly(self: ClaudeProcess, model: str | None) -> None:
        changing.set()
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(ClaudeProcess, "set_model", change_endlessly)
    async with _agent_with_prewarmed_cli(simulator, tmp_path) as agent:
        cli = agent.server.enrolled().prewarmed._ready[0].process
        body = turn("[[say never]]", model="claude-haiku-4-5")
        request = asyncio.create_task(agent.post("/v1/agent/chat", body))
        await changing.wait()
        await agent.post(f"/v1/agent/session/{body['session_id']}/interrupt")
        await request
        await until(lambda: not cli.alive)


@contextlib.asynccontextmanager
async def _agent_with_prewarmed_cli(simulator: RunningSimulator, folder: Path) -> AsyncIterator[Agent]:
    with launched(folder / "state") as launcher:
        async with (
            stand_in_gateway(simulator.url) as gateway,
            served_agent(gateway, folder / "state", launcher, spares=1) as agent,
        ):
            await until(agent.server.enrolled().prewarmed.pids)
            yield agent


async def _put(agent: Agent, session_id: str, path: str) -> dict[str, Any]:
    url = f"{agent.url}/v1/agent/session/{session_id}/files/{path}"
    async with agent.client.put(url, data=b"mine", headers=agent.headers) as answer:
        assert answer.status == 200, await answer.text()
        stored: dict[str, Any] = await answer.json()
        return stored


async def _listed(agent: Agent, session_id: str) -> list[str]:
    status, answer = await agent.get(f"/v1/agent/session/{session_id}/files")
    assert status == 200, answer
    return [entry["path"] for entry in answer["files"]]


@contextlib.asynccontextmanager
async def _agent_with_slow_starts(simulator: RunningSimulator, folder: Path) -> AsyncIterator[Agent]:
    cli, _ = slow_cli(folder / "bin", seconds=1.5)
    exposed = ("--expose", str(folder / "bin"), "--expose", str(bundled_cli().parent))
    with launched(folder / "state", *exposed) as launcher:
        async with (
            stand_in_gateway(simulator.url) as gateway,
            served_agent(gateway, folder / "state", launcher, claude_cli_path=cli, spares=1, live_sessions=8) as agent,
        ):
            yield agent


async def _reuse_start_of_deleted_session(agent: Agent) -> None:
    prewarmed = agent.server.enrolled().prewarmed
    async with prewarmed._context.start_limiter.session_slot("bob"):  # meanwhile no prewarmed CLI starts by itself
        while prewarmed.pids():
            await agent.chat(turn("[[say taken]]"))
        body = turn("[[say too late]]", timeout=1)
        assert (await agent.post("/v1/agent/chat", body))[0] == 504
        await agent.delete(f"/v1/agent/session/{body['session_id']}")
        await until(lambda: prewarmed.pids())
        pid = prewarmed.pids()[0]
        next_turn = turn("[[say next]]")
        assert (await agent.chat(next_turn))["content"] == "next"
        assert agent.cli_pid(next_turn["session_id"]) == pid
