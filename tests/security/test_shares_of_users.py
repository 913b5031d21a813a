"""Shares of users: an attacker with many sessions and a victim on one agent, with the real launcher and the real CLI.

The victim's turns, processes and files are unaffected, and the attacker's error names the limit.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hypercore_agents.agent.launcher.client import LauncherClient, LimitReached, Share
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.kit.linux import cgroups
from support.agent_server import FIRST_USER, Agent, served_agent, stand_in_gateway, tool, turn
from support.isolation_marks import needs_isolation
from support.launched_agent import LauncherOptions, launched_agent, run_bash
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


agent = launched_agent


@pytest.fixture(scope="module")
def launcher_options() -> LauncherOptions:
    """Return limits of sessions that add up to many times the limits of the agent."""
    arguments = ("--memory-mb", str(MEMORY_MB), "--processes", str(PROCESSES), "--session-memory-mb", "1024",
                 "--session-processes", "200")  # fmt: skip
    return LauncherOptions(arguments, FIRST_USER + 6_000, 1_000)


@pytest.fixture(scope="module")
def agent_settings() -> dict[str, Any]:
    return {"user_share": 0.5, "live_sessions": 20, "agent_memory_mb": 8192}


_BOMB = """
import os, time
while True:
    try:
        if os.fork() == 0:
            time.sleep(600)
    except BlockingIOError:
        time.sleep(0.01)
"""


async def test_one_users_sessions_cannot_exhaust_the_agents_processes(agent: Agent, launcher: LauncherClient) -> None:
    victim, carol, attackers = new_session_id(), new_session_id(), [new_session_id() for _ in range(4)]
    await run_bash(agent, "echo mine > note", victim, user_id="victim")
    pid = agent.cli_pid(victim)
    mallory = Share("mallory", 0.5)
    bombs = [
        asyncio.create_task(launcher.run_as(session, ["/usr/bin/python3", "-c", _BOMB], share=mallory, timeout=300))
        for session in attackers
    ]
    try:
        pids = Path(str(GROUPS.bases["pids"]))  # type: ignore[union-attr]
        await until(lambda: _fullest(pids) >= SHARE_PROCESSES - 1)
        said = await run_bash(
            agent, "for i in $(seq 60); do sleep 5 & done; cat note", victim, number=2, user_id="victim"
        )
        assert "mine" in said["content"]
        assert "fork" not in said["content"]
        assert agent.cli_pid(victim) == pid
        named = f"share of the agent's processes and threads, {SHARE_PROCESSES}"
        with pytest.raises(LimitReached, match=named) as info:
            await launcher.run_as(new_session_id(), ["/bin/sh", "-c", "sleep 9 & sleep 9 & wait"], share=mallory)
        assert info.value.details == {"limit": "processes"}
        # A session of another user starts while the share is full.
        await run_bash(agent, "true", carol, user_id="carol")
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


async def test_one_users_sessions_cannot_exhaust_the_agents_memory(agent: Agent) -> None:
    """The attacker's sessions together exceed their share; the kernel kills among them, never the victim."""
    victim, attackers = new_session_id(), [new_session_id() for _ in range(3)]
    await run_bash(agent, "echo mine > note", victim, user_id="victim")
    pid = agent.cli_pid(victim)
    # The victim is the largest process of the agent: the kernel's first choice among all sessions.
    largest = asyncio.create_task(
        run_bash(
            agent, _HOG.format(mb=700, seconds=5) + "; echo status $?; cat note", victim, number=2, user_id="victim"
        )
    )
    # On a busy machine the attackers start seconds apart, so each holds its memory until the next one has some.
    hogs = await asyncio.gather(
        *(
            agent.post(
                "/v1/agent/chat",
                turn(tool("Bash", command=_HOG.format(mb=500, seconds=15)), session, timeout=60, user_id="mallory"),
            )
            for session in attackers
        )
    )
    answer = await largest
    assert "got it all" in answer["content"]
    assert "mine" in answer["content"]
    assert "status 0" in answer["content"], "its process was not killed"
    assert answer["notices"] == []
    assert agent.cli_pid(victim) == pid
    named = f"this user's sessions used up their share of the agent's memory, {SHARE_MB} MB"
    for status, said in hogs:
        if status != 200:  # the kernel killed the CLI
            assert (status, said["error"]["details"]) == (502, {"limit": "memory"}), said
    assert any(named in str(said) for _, said in hogs), hogs
    for session in (victim, *attackers):
        await agent.delete(f"/v1/agent/session/{session}")


async def test_a_session_over_its_memory_limit_gets_an_error_that_names_it(agent: Agent) -> None:
    session = new_session_id()
    status, said = await agent.post(
        "/v1/agent/chat",
        turn(tool("Bash", command=_HOG.format(mb=1100, seconds=1)), session, timeout=60, user_id="dora"),
    )
    assert "got it all" not in said.get("content", "")
    # One user's share is 1,088 MB, the session's limit 1,024 MB: the inner one is reached first.
    assert "the session's memory limit of 1024 MB was reached" in str(said), (status, said)
    await agent.delete(f"/v1/agent/session/{session}")


async def test_sessions_beyond_a_users_share_park_that_users_sessions(
    simulator_process: RunningSimulator, launcher_state: Path, launcher: LauncherClient
) -> None:
    async with (
        stand_in_gateway(simulator_process.url) as gateway,
        # 300 MB for the server and 130 for each live session: four, and two for one user
        served_agent(gateway, launcher_state, launcher, user_share=0.5, agent_memory_mb=820) as agent,
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
