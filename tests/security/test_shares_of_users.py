"""Limits of one user's sessions together: an attacker with many sessions and a victim on one agent, the real launcher
and the real CLI. The victim's turns, processes and files stay right, and the attacker's error names the limit."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.agent.launcher.client import LauncherClient, LimitReached, Share
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.kit.linux import cgroups
from support.agent_server import FIRST_USER, Agent, launched, served_agent, stand_in_gateway, tool, turn
from support.isolation_marks import needs_isolation
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

GROUPS = cgroups.detect()
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.root,
    needs_isolation,
    pytest.mark.skipif(
        GROUPS is None or not {"memory", "pids"} <= GROUPS.enforced, reason="no control groups for memory and pids here"
    ),
]
MEMORY_MB, PROCESSES = 2560, 640
SHARE_MB, SHARE_PROCESSES = (MEMORY_MB - 384) // 2, (PROCESSES - PROCESSES // 8) // 2


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agent") / "state"


@pytest.fixture(scope="module")
def launcher(state: Path) -> Iterator[LauncherClient]:
    """A launcher whose sessions' limits add up to many times what the agent has."""
    with launched(
        state, "--memory-mb", str(MEMORY_MB), "--processes", str(PROCESSES), "--session-memory-mb", "1024",
        "--session-processes", "200", first=FIRST_USER + 6_000, users=1_000,
    ) as client:  # fmt: skip
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(simulator_process: RunningSimulator, state: Path, launcher: LauncherClient) -> AsyncIterator[Agent]:
    async with (
        stand_in_gateway(simulator_process.url) as gateway,
        served_agent(gateway, state, launcher, user_share=0.5, live_sessions=20, agent_memory_mb=8192) as agent,
    ):
        yield agent


async def bash(agent: Agent, script: str, session_id: str, *, number: int = 1, user_id: str) -> dict[str, Any]:
    """Let the model call Bash; return the answer, which must be a success."""
    return await agent.chat(turn(tool("Bash", command=script), session_id, number=number, timeout=60, user_id=user_id))


_BOMB = """
import os, time
while True:
    try:
        if os.fork() == 0:
            time.sleep(600)
    except BlockingIOError:
        time.sleep(0.01)
"""


async def test_many_sessions_of_one_user_cannot_take_the_agents_processes(
    agent: Agent, launcher: LauncherClient
) -> None:
    victim, carol, attackers = new_session_id(), new_session_id(), [new_session_id() for _ in range(4)]
    await bash(agent, "echo mine > note", victim, user_id="victim")
    pid = agent.cli_pid(victim)
    mallory = Share("mallory", 0.5)
    bombs = [
        asyncio.create_task(launcher.run_as(session, ["/usr/bin/python3", "-c", _BOMB], share=mallory, timeout=300))
        for session in attackers
    ]
    try:
        pids = Path(str(GROUPS.bases["pids"]))  # type: ignore[union-attr]
        await until(lambda: _fullest(pids) >= SHARE_PROCESSES - 1)
        said = await bash(agent, "for i in $(seq 60); do sleep 5 & done; cat note", victim, number=2, user_id="victim")
        assert "mine" in said["content"]
        assert "fork" not in said["content"]
        assert agent.cli_pid(victim) == pid
        named = f"share of the agent's processes and threads, {SHARE_PROCESSES}"
        with pytest.raises(LimitReached, match=named) as info:
            await launcher.run_as(new_session_id(), ["/bin/sh", "-c", "sleep 9 & sleep 9 & wait"], share=mallory)
        assert info.value.details == {"limit": "processes"}
        # Another user's session starts while the share is full.
        await bash(agent, "true", carol, user_id="carol")
    finally:
        for session in attackers:
            await launcher.remove(session)
        await asyncio.gather(*bombs, return_exceptions=True)
        for session in (victim, carol):
            await agent.delete(f"/v1/agent/session/{session}")


def _fullest(pids: Path) -> int:
    return max(int(path.read_text()) for path in pids.glob("hypercore-*-sessions/user-*/pids.current"))


_HOG = (
    'python3 -c \'import time; x = bytearray({mb} << 20); print("got" + " it all", flush=True); time.sleep({seconds})\''
)


async def test_many_sessions_of_one_user_cannot_take_the_agents_memory(agent: Agent) -> None:
    """The sum of the attacker's sessions passes their share; the kernel kills among them, never the victim."""
    victim, attackers = new_session_id(), [new_session_id() for _ in range(3)]
    await bash(agent, "echo mine > note", victim, user_id="victim")
    pid = agent.cli_pid(victim)
    # The victim is the largest process of the agent: the kernel's first choice, were it asked over all of them.
    largest = asyncio.create_task(
        bash(agent, _HOG.format(mb=700, seconds=5) + "; echo status $?; cat note", victim, number=2, user_id="victim")
    )
    hogs = await asyncio.gather(
        *(
            agent.post(
                "/v1/agent/chat",
                turn(tool("Bash", command=_HOG.format(mb=500, seconds=2)), session, timeout=60, user_id="mallory"),
            )
            for session in attackers
        )
    )
    answer = await largest
    assert "got it all" in answer["content"]
    assert "mine" in answer["content"]
    assert "status 0" in answer["content"], "its process completed"
    assert answer["notices"] == []
    assert agent.cli_pid(victim) == pid
    named = f"this user's sessions used up their share of the agent's memory, {SHARE_MB} MB"
    for status, said in hogs:
        if status != 200:  # the kernel chose the CLI
            assert (status, said["error"]["details"]) == (502, {"limit": "memory"}), said
    assert any(named in str(said) for _, said in hogs), hogs
    for session in (victim, *attackers):
        await agent.delete(f"/v1/agent/session/{session}")


async def test_a_session_over_its_own_memory_limit_is_told_so(agent: Agent) -> None:
    session = new_session_id()
    status, said = await agent.post(
        "/v1/agent/chat",
        turn(tool("Bash", command=_HOG.format(mb=1100, seconds=1)), session, timeout=60, user_id="dora"),
    )
    assert "got it all" not in said.get("content", "")
    # One user's share is 1,088 MB, the session's limit 1,024 MB: the inner one is reached first.
    assert "the session's memory limit of 1024 MB was reached" in str(said), (status, said)
    await agent.delete(f"/v1/agent/session/{session}")


async def test_a_user_parks_their_own_sessions_when_they_use_up_their_share(
    simulator_process: RunningSimulator, state: Path, launcher: LauncherClient
) -> None:
    async with (
        stand_in_gateway(simulator_process.url) as gateway,
        # 300 MB for the server and 130 for each live session: four, and two for one user
        served_agent(gateway, state, launcher, user_share=0.5, agent_memory_mb=820) as agent,
    ):
        of_bob = new_session_id()
        await agent.chat(turn("hi", of_bob, user_id="bob"))
        pid = agent.cli_pid(of_bob)
        sessions = [new_session_id() for _ in range(3)]
        for session in sessions:
            await agent.chat(turn("hi", session, user_id="mallory"))
        enrolled = agent.server.enrolled()
        states = [enrolled.get(session).view().state for session in sessions]
        assert states == ["parked", "live", "live"]
        assert agent.cli_pid(of_bob) == pid
