"""Starts that take long because the host is busy: they are not killed, and what they cost is not thrown away."""

import shlex
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk._internal.query import Query

from agent_sides import Agent, StandInGateway, launched, served_agent, stand_in_gateway, turn, until
from fixtures_simulator import RunningSimulator
from hypercore_agents.agent.options import bundled_cli

_SLOW_CLI = """#!/bin/sh
echo start >> {count} 2>/dev/null
/usr/bin/env python3 -S -c 'import time
while time.process_time() < {seconds}: pass'
exec {cli} "$@"
"""


def slow_cli(folder: Path, seconds: float) -> tuple[Path, Path]:
    """Write a Claude CLI that first computes for so long; return it, and the file in which it counts its starts."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    count, cli = folder / "count", folder / "claude"
    count.write_text("")
    count.chmod(0o666)
    cli.write_text(_SLOW_CLI.format(count=count, seconds=seconds, cli=shlex.quote(str(bundled_cli()))))
    cli.chmod(cli.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return cli, count


@pytest.fixture
async def gateway(simulator: RunningSimulator) -> AsyncIterator[StandInGateway]:
    async with stand_in_gateway(simulator.url) as stand_in:
        yield stand_in


async def test_a_start_that_makes_progress_outlives_its_time_limit(gateway: StandInGateway, tmp_path: Path) -> None:
    cli, count = slow_cli(tmp_path / "bin", seconds=1.5)
    async with served_agent(gateway, tmp_path / "agent", claude_cli_path=cli, cli_start_timeout=1) as agent:
        assert (await agent.chat(turn("[[say here]]")))["content"] == "here"
    assert count.read_text() == "start\n"


async def test_the_sdks_own_limit_of_a_start_does_not_apply(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Query.__init__

    def impatient(self: Query, *arguments: Any, **more: Any) -> None:
        made(self, *arguments, **{**more, "initialize_timeout": 0.3})  # in place of 60 s

    monkeypatch.setattr(Query, "__init__", impatient)
    cli, _ = slow_cli(tmp_path / "bin", seconds=1.5)
    async with served_agent(gateway, tmp_path / "agent", claude_cli_path=cli) as agent:
        assert (await agent.chat(turn("[[say here]]")))["content"] == "here"


async def test_the_next_turn_uses_the_start_of_a_turn_that_gave_up(gateway: StandInGateway, tmp_path: Path) -> None:
    cli, count = slow_cli(tmp_path / "bin", seconds=1.5)
    async with served_agent(gateway, tmp_path / "agent", claude_cli_path=cli, live_sessions=1) as agent:
        body = turn("[[say too late]]", timeout=1)
        status, error = await agent.post("/v1/agent/chat", body)
        assert (status, error["error"]["type"]) == (504, "deadline_exceeded")
        answer = await agent.chat(turn("[[say now]]", body["session_id"], number=2))
        assert answer["content"] == "now"
        assert count.read_text() == "start\n"
        await agent.delete(f"/v1/agent/session/{body['session_id']}")
        await until(lambda: agent.server.enrolled().room.used == 0)


async def test_a_start_that_fails_after_its_turn_gave_up_frees_its_place(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    cli, _ = slow_cli(tmp_path / "bin", seconds=1.5)
    cli.write_text(cli.read_text().partition("exec")[0] + "exit 3\n")
    async with served_agent(gateway, tmp_path / "agent", claude_cli_path=cli, live_sessions=1) as agent:
        assert (await agent.post("/v1/agent/chat", turn("hi", timeout=1)))[0] == 504
        assert agent.server.enrolled().room.used == 1
        await until(lambda: agent.server.enrolled().room.used == 0)


async def test_the_start_of_a_session_that_is_over_becomes_a_spare(simulator: RunningSimulator, tmp_path: Path) -> None:
    cli, _ = slow_cli(tmp_path / "bin", seconds=1.5)
    exposed = ("--expose", str(tmp_path / "bin"), "--expose", str(bundled_cli().parent))
    with launched(tmp_path / "state", *exposed) as launcher:
        async with (
            stand_in_gateway(simulator.url) as gateway,
            served_agent(
                gateway, tmp_path / "state", launcher, claude_cli_path=cli, spares=1, live_sessions=8
            ) as agent,
        ):
            await _start_becomes_a_spare(agent)


async def _start_becomes_a_spare(agent: Agent) -> None:
    spares = agent.server.enrolled().spares
    async with spares._launch.connects.session("somebody"):  # so that no spare starts by itself
        while spares.pids():
            await agent.chat(turn("[[say taken]]"))
        body = turn("[[say too late]]", timeout=1)
        assert (await agent.post("/v1/agent/chat", body))[0] == 504
        await agent.delete(f"/v1/agent/session/{body['session_id']}")
        await until(lambda: spares.pids())
        pid = spares.pids()[0]
        fresh = turn("[[say fresh]]")
        assert (await agent.chat(fresh))["content"] == "fresh"
        assert agent.cli_pid(fresh["session_id"]) == pid
