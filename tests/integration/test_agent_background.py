"""Background jobs: how long they may run, whether their files are archived, and which notices the user gets.

The Agent SDK and the CLI are real.
"""

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
from hypercore_agents.agent.persistence.transcript_mirror import TranscriptMirror
from hypercore_agents.agent.sessions.parking import Parking
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.agent.sessions.shutdown import Shutdown
from hypercore_agents.api.ids import new_session_id
from support.agent_server import (
    MCP_SERVER,
    Agent,
    StandInGateway,
    another_agent,
    served_agent,
    stored_files,
    tool,
    turn,
)
from support.waiting import until

WRITES_LATER = "(until test -e go; do sleep 0.02; done; echo > made; exec sleep {seconds}) > /dev/null 2>&1 &"
ENDED = "background processes of the session were ended: "


@pytest_asyncio.fixture
async def agent(gateway: StandInGateway, tmp_path: Path) -> AsyncIterator[Agent]:
    async with served_agent(gateway, tmp_path / "agent", park_after=300, background_max=900) as served:
        yield served


async def start_job(agent: Agent, *, seconds: float = 600) -> Session:
    """Run a turn that starts a background job; return its session."""
    session_id = new_session_id()
    answer = await agent.chat(turn(tool("Bash", command=WRITES_LATER.format(seconds=seconds)), session_id))
    assert (answer["status"], answer["notices"]) == ("completed", [])
    session = agent.server.enrolled().get(session_id)
    assert session.jobs.running
    return session


async def run_parking(agent: Agent, session: Session, *, idle: float) -> None:
    """Run the agent's parking as if the session's last turn had ended `idle` seconds ago."""
    parking = agent.server.enrolled()._parking
    assert isinstance(parking, Parking)
    session.used_at -= idle
    await parking.run()


async def write_late(session: Session) -> None:
    files = session.files.folder.workspace
    (files / "go").touch()
    await until((files / "made").exists)


def notices(gateway: StandInGateway, session_id: str) -> list[str]:
    return [json.loads(each.data)["text"] for each in gateway.events[session_id] if each.name == "notice"]


async def test_a_job_continues_in_an_idle_session_and_its_files_are_archived_at_its_end(
    agent: Agent, gateway: StandInGateway
) -> None:
    session = await start_job(agent, seconds=0)
    await run_parking(agent, session, idle=800)
    assert (session.status.holds_slot, session.jobs.running) == (True, True)
    status, answer = await agent.post(f"/v1/agent/session/{session.session_id}/release")
    assert (status, answer["error"]["type"]) == (409, "conflict"), "the session is not released either"
    await write_late(session)
    while session.jobs.running:
        await run_parking(agent, session, idle=0)
    await until(lambda: not session.files.archive.changed)
    assert stored_files(gateway, session.session_id) == {"go", "made"}
    assert session.status.holds_slot, "idle only since its job ended"
    assert notices(gateway, session.session_id) == []
    await run_parking(agent, session, idle=301)
    assert not session.status.holds_slot
    answer = await agent.chat(turn("hello", session.session_id, number=2))
    assert answer["notices"] == []


async def test_a_job_that_runs_too_long_is_ended_and_its_files_are_archived(
    agent: Agent, gateway: StandInGateway
) -> None:
    session = await start_job(agent)
    await write_late(session)
    await run_parking(agent, session, idle=901)
    assert (session.status.holds_slot, session.jobs.running) == (False, False)
    await until(lambda: not session.files.archive.changed and notices(gateway, session.session_id))
    assert stored_files(gateway, session.session_id) == {"go", "made"}
    notice = ENDED + "they may run for 900 s after a turn (BACKGROUND_MAX)"
    assert notices(gateway, session.session_id) == [notice]
    answer = await agent.chat(turn("hello", session.session_id, number=2))
    assert answer["notices"] == [notice]
    assert [event.name for event in gateway.events[session.session_id]].count("error") == 0


async def test_a_drain_ends_jobs_and_the_next_answer_reports_it(gateway: StandInGateway, tmp_path: Path) -> None:
    notice = ENDED + "its agent was shut down"
    async with served_agent(gateway, tmp_path / "one") as one:
        session = await start_job(one)
        session_id = session.session_id
        await write_late(session)
        await one.server.drain()
        assert session.process is None
        assert stored_files(gateway, session_id) == {"go", "made"}
        assert notices(gateway, session_id) == [notice]
    async with another_agent(gateway, tmp_path / "two") as two:
        answer = await two.chat(turn("hello", session_id, number=2, generation=2))
        assert answer["notices"] == [notice]
        answer = await two.chat(turn("hello", session_id, number=3, generation=2))
        assert answer["notices"] == []
        assert [event.name for event in gateway.events[session_id]].count("error") == 0


async def test_deleting_a_session_reports_the_jobs_that_it_ended(agent: Agent) -> None:
    session = await start_job(agent)
    status, answer = await agent.delete(f"/v1/agent/session/{session.session_id}")
    assert (status, answer["notices"]) == (200, [ENDED + "the session was deleted"])
    parked = await start_job(agent)
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


async def test_a_cancelled_parking_still_reports_the_job_and_allows_the_kill(
    agent: Agent, gateway: StandInGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await start_job(agent)
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
    assert session_processes(session.files.folder.root) == set()
    await until(lambda: notices(gateway, session.session_id) == [ENDED + "its agent was shut down"])


async def test_a_job_counts_as_running_if_its_check_fails(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await start_job(agent)

    def fail(*_: object) -> tuple[bool, bool]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("hypercore_agents.agent.isolation.backends.background_of", fail)
    status, answer = await agent.delete(f"/v1/agent/session/{session.session_id}")
    assert (status, answer["notices"]) == (200, [ENDED + "the session was deleted"])


async def test_a_job_that_ended_with_a_killed_cli_is_reported(agent: Agent, gateway: StandInGateway) -> None:
    session = await start_job(agent)
    os.kill(agent.cli_pid(session.session_id), signal.SIGKILL)
    await until(lambda: session.process is not None and not session.process.alive)
    await run_parking(agent, session, idle=0)
    await until(lambda: notices(gateway, session.session_id) == [ENDED + "the session's Claude CLI ended"])
    answer = await agent.chat(turn("hello", session.session_id, number=2))
    assert answer["notices"] == [ENDED + "the session's Claude CLI ended"]


async def test_a_job_of_a_turn_whose_cli_is_killed_after_an_interrupt_is_reported(agent: Agent) -> None:
    session_id = new_session_id()
    prompt = f"{tool('Bash', command=WRITES_LATER.format(seconds=600))} [[tokens 2000]] [[rate 10]]"
    asked = asyncio.create_task(agent.chat(turn(prompt, session_id)))
    await until(lambda: agent.server.enrolled().counts()[1] == 1)
    session = agent.server.enrolled().get(session_id)
    cli = agent.cli_pid(session_id)
    await until(lambda: background_of(session.files.folder.root, cli) == (False, True))
    os.kill(cli, signal.SIGSTOP)  # it cannot react to the interrupt
    await agent.post(f"/v1/agent/session/{session_id}/interrupt")
    answer = await asked
    assert (answer["status"], answer["notices"]) == ("interrupted", [ENDED + "the session's Claude CLI ended"])
    assert session_processes(session.files.folder.root) == set()


async def test_a_job_of_a_turn_whose_cli_crashes_is_reported(agent: Agent) -> None:
    session_id = new_session_id()
    prompt = f"{tool('Bash', command=WRITES_LATER.format(seconds=600))} [[tokens 2000]] [[rate 10]]"
    asked = asyncio.create_task(agent.post("/v1/agent/chat", turn(prompt, session_id)))
    await until(lambda: agent.server.enrolled().counts()[1] == 1)
    session = agent.server.enrolled().get(session_id)
    cli = agent.cli_pid(session_id)
    await until(lambda: background_of(session.files.folder.root, cli) == (False, True))
    os.kill(cli, signal.SIGKILL)
    status, answer = await asked
    assert (status, answer["error"]["type"], answer["error"]["retryable"]) == (502, "agent_unreachable", False)
    answer = await agent.chat(turn("hello", session_id, number=2))
    assert ENDED + "the session's Claude CLI ended" in answer["notices"]


async def test_a_drain_waits_for_a_closing_turn_and_reports_its_job(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, proceed, waited = asyncio.Event(), asyncio.Event(), list[bool]()
    conclude, turns_end = TranscriptMirror.conclude, Shutdown._turns_end

    async def slow(self: TranscriptMirror, *args: Any, **more: Any) -> Any:
        closing.set()
        await proceed.wait()
        return await conclude(self, *args, **more)

    async def noted(self: Shutdown, seconds: float) -> bool:
        waited.append(await turns_end(self, seconds))
        return waited[-1]

    monkeypatch.setattr(TranscriptMirror, "conclude", slow)
    monkeypatch.setattr(Shutdown, "_turns_end", noted)
    async with served_agent(gateway, tmp_path / "one", drain_grace=0, interrupt_grace=0.05) as agent:
        session_id = new_session_id()
        prompt = tool("Bash", command=WRITES_LATER.format(seconds=600))
        asked = asyncio.create_task(agent.chat(turn(prompt, session_id)))
        await closing.wait()
        drained = asyncio.create_task(agent.server.drain())
        await until(lambda: waited == [False, False])
        proceed.set()
        assert (await asked)["status"] == "completed"
        await drained
        assert notices(gateway, session_id) == [ENDED + "its agent was shut down"]
        assert agent.server.enrolled().get(session_id).process is None


async def test_mcp_servers_do_not_count_as_jobs(agent: Agent, gateway: StandInGateway, tmp_path: Path) -> None:
    server = tmp_path / "notes.py"
    server.write_text(MCP_SERVER)
    options: dict[str, Any] = {
        "mcp_servers": {"notes": {"command": sys.executable, "args": ["-I", "-S", str(server)]}},
        "timeout": 90,
    }
    session_id = new_session_id()
    await agent.chat(turn('[[tool mcp__notes__remember {"word": "cobalt"}]]', session_id, **options))
    session = agent.server.enrolled().get(session_id)
    assert (session.files.archive.may_be_written_late, session.jobs.running) == (True, False), (
        "it may write files, but it is not a job"
    )
    job = tool("Bash", command=WRITES_LATER.format(seconds=600))
    answer = await agent.chat(turn(job, session_id, number=2, **options))
    assert session.jobs.running, answer["content"]
    await run_parking(agent, session, idle=901)
    assert not session.status.holds_slot
    answer = await agent.chat(turn("hello", session_id, number=3, **options))
    assert [notice.startswith(ENDED) for notice in answer["notices"]] == [True]
    await run_parking(agent, session, idle=301)
    assert not session.status.holds_slot
    answer = await agent.chat(turn("hello", session_id, number=4, **options))
    assert answer["notices"] == []
