"""Readiness: an agent whose trial starts fail takes no turns and reports that."""

import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypercore_agents.api.internal import AgentConfiguration
from support.agent_server import FIRST_USER, Agent, launched, served_agent, stand_in_gateway, turn
from support.isolation_marks import needs_isolation
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

pytestmark = [
    pytest.mark.root,
    needs_isolation,
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system for 2000 files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=2000,mode=755", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Use up all files of a file system."""
    folder = disk / "filling"
    folder.mkdir()
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        for number in range(2001):
            (folder / str(number)).touch()
    try:
        yield
    finally:
        shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def agent_on(disk: Path, simulator: RunningSimulator, *, sessions_move: bool = True) -> AsyncIterator[Agent]:
    with launched(disk / "state", "--session-disk-mb", "12", "--storage", "scan", first=FIRST_USER) as launcher:
        async with stand_in_gateway(simulator.url) as gateway:
            gateway.configuration = AgentConfiguration(
                max_concurrent=9, tools=True, heartbeat_seconds=0.2, sessions_move=sessions_move
            )
            async with served_agent(gateway, disk / "state", launcher, spares=0) as agent:
                agent.server.readiness._pause = 0.2
                yield agent


async def refusal(agent: Agent, user_id: str) -> dict[str, Any]:
    """Return the error of a turn that is expected to fail."""
    status, answer = await agent.post("/v1/agent/chat", turn("[[say it]]", user_id=user_id))
    assert status >= 500
    assert isinstance(answer, dict)
    error: dict[str, Any] = answer["error"]
    return error


async def test_an_agent_without_disk_space_is_not_ready_until_it_recovers(
    small_disk: Path, simulator_process: RunningSimulator
) -> None:
    async with agent_on(small_disk, simulator_process) as agent:
        answered = await agent.chat(turn("[[say one]]"))
        assert answered["content"] == "one"
        first = answered["session_id"]
        with filled(small_disk):
            for number in (2, 3):
                refused = await refusal(agent, f"user-{number}")
                assert refused["retryable"] is True
                assert refused["details"] == {"acted": False, "other_agent": True}, "the manager tries another agent"
            await until(lambda: agent.server.not_ready() is not None)
            assert "cannot start the Claude CLI" in str(agent.server.not_ready())
            await until(lambda: not agent.gateway.heartbeats[-1].ready)
            refused = await refusal(agent, "user-4")
            assert refused["type"] == "unavailable"
            assert "sessions move" in refused["message"]
            assert refused["details"] == {"acted": False, "other_agent": True}
            # No other agent may hold the state of an earlier session.
            status, answer = await agent.post("/v1/agent/chat", turn("[[say more]]", session_id=first, number=2))
            assert status == 503
            assert isinstance(answer, dict)
            assert "other_agent" not in (answer["error"].get("details") or {})
        await until(lambda: agent.server.not_ready() is None)
        await until(lambda: agent.gateway.heartbeats[-1].ready)
        assert (await agent.chat(turn("[[say four]]", user_id="user-5")))["content"] == "four"


async def test_an_agent_of_one_user_stays_ready(small_disk: Path, simulator_process: RunningSimulator) -> None:
    async with agent_on(small_disk, simulator_process, sessions_move=False) as agent:
        with filled(small_disk):
            for number in (1, 2, 3):
                await refusal(agent, f"user-{number}")
            assert agent.server.not_ready() is None
        assert (await agent.chat(turn("[[say two]]")))["content"] == "two"
