"""What a turn leaves running: how long it may, what it writes, and that its user is told. Real Agent SDK and CLI."""

import asyncio
import errno
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.agent.isolation.processes import background_of, session_processes
from hypercore_agents.agent.persistence.transcript import TranscriptMirror
from hypercore_agents.agent.sessions.parking import Parking
from hypercore_agents.agent.sessions.registry import Sessions
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.api.ids import new_session_id
from support.agent_server import (
    MCP_SERVER,
    Agent,
    StandInGateway,
    another_agent,
    kept_files,
    served_agent,
    stand_in_gateway,
    tool,
    turn,
)
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

WRITES_LATER = "(until test -e go; do sleep 0.02; done; echo > made; exec sleep {seconds}) > /dev/null 2>&1 &"
ENDED = "what a turn left running in the background was ended: "


@pytest_asyncio.fixture
async def gateway(simulator: RunningSimulator) -> AsyncIterator[StandInGateway]:
    async with stand_in_gateway(simulator.url) as running:
        yield running


@pytest_asyncio.fixture
async def agent(gateway: StandInGateway, tmp_path: Path) -> AsyncIterator[Agent]:
    async with served_agent(gateway, tmp_path / "agent", park_after=300, background_max=900) as served:
        yield served


async def leave_running(agent: Agent, *, seconds: float = 600) -> Session:
    """Run a turn that leaves a job; return its session."""
    session_id = new_session_id()
    answer = await agent.chat(turn(tool("Bash", command=WRITES_LATER.format(seconds=seconds)), session_id))
    assert (answer["status"], answer["notices"]) == ("completed", [])
    session = agent.server.enrolled().get(session_id)
    assert session.jobs.running
    return session


async def look(agent: Agent, session: Session, *, idle: float) -> None:
    """Have the agent look, as if the session's last turn had ended so many seconds ago."""
    keeper = agent.server.enrolled()._keeper
    assert isinstance(keeper, Parking)
    session.used_at -= idle
    await keeper.look()


async def write_late(session: Session) -> None:
    files = session.folder.workspace
    (files / "go").touch()
    await until((files / "made").exists)


def told(gateway: StandInGateway, session_id: str) -> list[str]:
    return [json.loads(each.data)["text"] for each in gateway.events[session_id] if each.name == "notice"]


async def test_a_job_is_let_run_though_its_session_is_idle_and_what_it_wrote_is_kept_when_it_ends(
    agent: Agent, gateway: StandInGateway
) -> None:
    session = await leave_running(agent, seconds=0)
    await look(agent, session, idle=800)
    assert (session.resident, session.jobs.running) == (True, True)
    status, answer = await agent.post(f"/v1/agent/session/{session.session_id}/release")
    assert (status, answer["error"]["type"]) == (409, "conflict"), "its place is not taken either"
    await write_late(session)
    while session.jobs.running:
        await look(agent, session, idle=0)
    await until(lambda: not session.archive.changed)
    assert kept_files(gateway, session.session_id) == {"go", "made"}
    assert session.resident, "idle only since its job ended"
    assert told(gateway, session.session_id) == []
    await look(agent, session, idle=301)
    assert not session.resident
    answer = await agent.chat(turn("hello", session.session_id, number=2))
    assert answer["notices"] == []


async def test_a_job_that_runs_too_long_is_ended_what_it_wrote_is_kept_and_its_user_told(
    agent: Agent, gateway: StandInGateway
) -> None:
    session = await leave_running(agent)
    await write_late(session)
    await look(agent, session, idle=901)
    assert (session.resident, session.jobs.running) == (False, False)
    await until(lambda: not session.archive.changed and told(gateway, session.session_id))
    assert kept_files(gateway, session.session_id) == {"go", "made"}
    notice = ENDED + "it may go on for 900 s after a turn (BACKGROUND_MAX)"
    assert told(gateway, session.session_id) == [notice]
    answer = await agent.chat(turn("hello", session.session_id, number=2))
    assert answer["notices"] == [notice]
    assert [event.name for event in gateway.events[session.session_id]].count("error") == 0


async def test_a_drain_ends_jobs_and_the_agent_where_the_session_goes_on_tells_its_user(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    notice = ENDED + "its agent was shut down"
    async with served_agent(gateway, tmp_path / "one") as one:
        session = await leave_running(one)
        session_id = session.session_id
        await write_late(session)
        await one.server.drain()
        assert session.process is None
        assert kept_files(gateway, session_id) == {"go", "made"}
        assert told(gateway, session_id) == [notice]
    async with another_agent(gateway, tmp_path / "two") as two:
        answer = await two.chat(turn("hello", session_id, number=2, generation=2))
        assert answer["notices"] == [notice]
        answer = await two.chat(turn("hello", session_id, number=3, generation=2))
        assert answer["notices"] == []
        assert [event.name for event in gateway.events[session_id]].count("error") == 0


async def test_deleting_a_session_says_what_it_ended(agent: Agent) -> None:
    session = await leave_running(agent)
    status, answer = await agent.delete(f"/v1/agent/session/{session.session_id}")
    assert (status, answer["notices"]) == (200, [ENDED + "the session was deleted"])
    parked = await leave_running(agent)
    async with parked.guard:  # the deletion waits for the parking that came before it
        parking = asyncio.create_task(parked.park("its agent was shut down"))
        await asyncio.sleep(0)
        deleting = asyncio.create_task(agent.delete(f"/v1/agent/session/{parked.session_id}"))
        await until(lambda: len(parked.guard._waiters or ()) == 2)
    status, answer = await deleting
    assert await parking
    assert (status, answer["notices"]) == (200, [ENDED + "its agent was shut down"])
    quiet = turn("hello")
    await agent.chat(quiet)
    status, answer = await agent.delete(f"/v1/agent/session/{quiet['session_id']}")
    assert (status, answer["notices"]) == (200, [])


async def test_a_parking_that_is_cut_off_forgets_neither_the_cli_nor_its_job(
    agent: Agent, gateway: StandInGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await leave_running(agent)
    process = session.process
    assert process is not None
    reached = asyncio.Event()

    async def hangs() -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(process, "_disconnect", hangs)
    parking = asyncio.create_task(session.park("its agent was shut down"))
    await reached.wait()
    monkeypatch.undo()
    parking.cancel()
    await asyncio.wait((parking,))
    assert parking.cancelled()
    await session.kill()
    assert session_processes(session.folder.root) == set()
    await until(lambda: told(gateway, session.session_id) == [ENDED + "its agent was shut down"])


async def test_a_look_that_finds_no_descriptor_takes_what_it_cannot_see_to_run(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await leave_running(agent)

    def blind(*_: object) -> tuple[bool, bool]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("hypercore_agents.agent.isolation.backends.background_of", blind)
    status, answer = await agent.delete(f"/v1/agent/session/{session.session_id}")
    assert (status, answer["notices"]) == (200, [ENDED + "the session was deleted"])


async def test_a_job_that_went_with_a_killed_cli_is_told_of(agent: Agent, gateway: StandInGateway) -> None:
    session = await leave_running(agent)
    os.kill(agent.cli_pid(session.session_id), signal.SIGKILL)
    await until(lambda: session.process is not None and not session.process.alive)
    await look(agent, session, idle=0)
    await until(lambda: told(gateway, session.session_id) == [ENDED + "the session's Claude CLI ended"])
    answer = await agent.chat(turn("hello", session.session_id, number=2))
    assert answer["notices"] == [ENDED + "the session's Claude CLI ended"]


async def test_a_job_begun_in_a_turn_whose_cli_has_to_be_killed_is_told_of(agent: Agent) -> None:
    session_id = new_session_id()
    prompt = f"{tool('Bash', command=WRITES_LATER.format(seconds=600))} [[tokens 2000]] [[rate 10]]"
    asked = asyncio.create_task(agent.chat(turn(prompt, session_id)))
    await until(lambda: agent.server.enrolled().counts()[1] == 1)
    session = agent.server.enrolled().get(session_id)
    cli = agent.cli_pid(session_id)
    await until(lambda: background_of(session.folder.root, cli) == (False, True))
    os.kill(cli, signal.SIGSTOP)  # it will not hear that it is interrupted
    await agent.post(f"/v1/agent/session/{session_id}/interrupt")
    answer = await asked
    assert (answer["status"], answer["notices"]) == ("interrupted", [ENDED + "the session's Claude CLI ended"])
    assert session_processes(session.folder.root) == set()


async def test_a_job_begun_in_a_turn_whose_cli_crashes_is_told_of(agent: Agent) -> None:
    session_id = new_session_id()
    prompt = f"{tool('Bash', command=WRITES_LATER.format(seconds=600))} [[tokens 2000]] [[rate 10]]"
    asked = asyncio.create_task(agent.post("/v1/agent/chat", turn(prompt, session_id)))
    await until(lambda: agent.server.enrolled().counts()[1] == 1)
    session = agent.server.enrolled().get(session_id)
    cli = agent.cli_pid(session_id)
    await until(lambda: background_of(session.folder.root, cli) == (False, True))
    os.kill(cli, signal.SIGKILL)
    status, answer = await asked
    assert (status, answer["error"]["type"], answer["error"]["retryable"]) == (502, "agent_unreachable", False)
    answer = await agent.chat(turn("hello", session_id, number=2))
    assert ENDED + "the session's Claude CLI ended" in answer["notices"]


async def test_a_drain_waits_for_a_turn_that_is_closing_and_tells_of_its_job(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, go_on, waited = asyncio.Event(), asyncio.Event(), list[bool]()
    conclude, idle = TranscriptMirror.conclude, Sessions._idle

    async def slow(self: TranscriptMirror, *args: Any, **more: Any) -> Any:
        closing.set()
        await go_on.wait()
        return await conclude(self, *args, **more)

    async def noted(self: Sessions, seconds: float) -> bool:
        waited.append(await idle(self, seconds))
        return waited[-1]

    monkeypatch.setattr(TranscriptMirror, "conclude", slow)
    monkeypatch.setattr(Sessions, "_idle", noted)
    async with served_agent(gateway, tmp_path / "one", drain_grace=0, interrupt_grace=0.05) as agent:
        session_id = new_session_id()
        prompt = tool("Bash", command=WRITES_LATER.format(seconds=600))
        asked = asyncio.create_task(agent.chat(turn(prompt, session_id)))
        await closing.wait()
        drained = asyncio.create_task(agent.server.drain())
        await until(lambda: waited == [False, False])
        go_on.set()
        assert (await asked)["status"] == "completed"
        await drained
        assert told(gateway, session_id) == [ENDED + "its agent was shut down"]
        assert agent.server.enrolled().get(session_id).process is None


async def test_mcp_servers_are_no_jobs_and_a_job_beside_them_is_one(
    agent: Agent, gateway: StandInGateway, tmp_path: Path
) -> None:
    server = tmp_path / "notes.py"
    server.write_text(MCP_SERVER)
    options: dict[str, Any] = {
        "mcp_servers": {"notes": {"command": sys.executable, "args": ["-I", "-S", str(server)]}},
        "timeout": 90,
    }
    session_id = new_session_id()
    await agent.chat(turn('[[tool mcp__notes__remember {"word": "cobalt"}]]', session_id, **options))
    session = agent.server.enrolled().get(session_id)
    assert (session.archive.restless, session.jobs.running) == (True, False), "it may write, but it is no job"
    job = tool("Bash", command=WRITES_LATER.format(seconds=600))
    answer = await agent.chat(turn(job, session_id, number=2, **options))
    assert session.jobs.running, answer["content"]
    await look(agent, session, idle=901)
    assert not session.resident
    answer = await agent.chat(turn("hello", session_id, number=3, **options))
    assert [notice.startswith(ENDED) for notice in answer["notices"]] == [True]
    await look(agent, session, idle=301)
    assert not session.resident
    answer = await agent.chat(turn("hello", session_id, number=4, **options))
    assert answer["notices"] == []
