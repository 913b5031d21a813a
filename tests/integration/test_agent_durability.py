"""Sessions that outlive their agent: real agent servers, Agent SDK and Claude CLI, and a stand-in gateway and store."""

import asyncio
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hypercore_agents.agent.claude.process import ClaudeEnded, ClaudeProcess
from hypercore_agents.agent.claude.start import start
from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.agent.isolation.backends import SharedUserIsolation
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import Transcript, TranscriptEntry
from support.agent_server import (
    Agent,
    StandInGateway,
    another_agent,
    frames,
    served_agent,
    stored_files,
    tool,
    turn,
)
from support.folders_in_use import content_of, entries_below, files_below
from support.waiting import until


def workspace(agent: Agent, session_id: str) -> Path:
    return SessionFolder.of(Path(agent.server.settings.agent_state_dir), session_id).workspace


async def test_a_session_continues_on_another_agent_with_its_history_and_files(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as one:
        answer = await one.chat(turn("remember the word cobalt", session_id))
        assert (answer["durable"], answer["workspace_durable"]) == (True, True)
        assert session_id not in gateway.workspaces  # nothing was written, so nothing is sent
        answer = await one.chat(turn(tool("Write", file_path="notes/a.txt", content="blue"), session_id, number=2))
        assert (answer["durable"], answer["workspace_durable"]) == (True, True)
        await one.chat(turn(tool("Bash", command="chmod 0 notes/a.txt; ln -s /etc/passwd link"), session_id, number=3))
        await one.chat(turn(tool("Bash", command="chmod 600 notes/a.txt"), session_id, number=4))
    async with another_agent(gateway, tmp_path / "two") as two:
        answer = await two.chat(turn("[[recall 1]]", session_id, number=5, generation=2))
        assert "cobalt" in answer["content"]
        assert answer["notices"] == []
        assert (workspace(two, session_id) / "notes/a.txt").read_text() == "blue"
        assert (workspace(two, session_id) / "link").is_symlink()
        answer = await two.chat(turn(tool("Bash", command="cat notes/a.txt"), session_id, number=6, generation=2))
        assert "blue" in answer["content"]


def opening(session_id: str, *, number: int, generation: int) -> dict[str, Any]:
    chat = turn("", session_id, number=number, generation=generation)
    return {name: chat[name] for name in ("user_id", "placement")}


async def test_uploaded_files_are_stored_at_once_and_present_on_another_agent_before_any_turn(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    files = f"/v1/agent/session/{session_id}/files"
    async with served_agent(gateway, tmp_path / "one") as one:
        await one.chat(turn("remember the word cobalt", session_id))
        async with one.client.put(f"{one.url}{files}/in/a.txt", data=b"blue", headers=one.headers) as put:
            assert (put.status, (await put.json())["workspace_durable"]) == (200, True)
        assert not one.server.enrolled().get(session_id).files.archive.changed
        gateway.store_works = False
        async with one.client.put(f"{one.url}{files}/lost.txt", data=b"x", headers=one.headers) as put:
            assert (put.status, (await put.json())["workspace_durable"]) == (200, False)
        gateway.store_works = True
    async with another_agent(gateway, tmp_path / "two") as two:
        assert (await two.get(files))[0] == 404
        asked = opening(session_id, number=2, generation=2)
        answers = await asyncio.gather(*(two.post(f"/v1/agent/session/{session_id}/open", asked) for _ in range(3)))
        assert [status for status, _ in answers] == [200, 200, 200]
        _, listed = await two.get(files)
        assert [entry["path"] for entry in listed["files"]] == ["in", "in/a.txt"]
        async with two.client.get(f"{two.url}{files}/in/a.txt", headers=two.headers) as got:
            assert (got.status, await got.read()) == (200, b"blue")
        async with two.client.put(f"{two.url}{files}/b.txt", data=b"red", headers=two.headers) as put:
            assert (put.status, (await put.json())["workspace_durable"]) == (200, True)
        answer = await two.chat(turn(tool("Bash", command="cat b.txt in/a.txt"), session_id, number=2, generation=2))
        assert "redblue" in answer["content"]
        assert answer["notices"] == []
        answer = await two.chat(turn("[[recall 1]]", session_id, number=3, generation=2))
        assert "cobalt" in answer["content"]
        for wrong, status in (
            (asked | {"user_id": "bob"}, 404),
            (opening(session_id, number=9, generation=1), 409),
            (opening(new_session_id(), number=2, generation=1), 400),
        ):
            assert (await two.post(f"/v1/agent/session/{session_id}/open", wrong))[0] == status, wrong


async def test_opening_a_session_that_is_unplaced_meanwhile_is_refused_as_retryable(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served_agent(gateway, tmp_path / "one") as agent:
        sessions = agent.server.enrolled()

        async def is_refused(session_id: str) -> None:
            asked = opening(session_id, number=2, generation=1)
            status, answer = await agent.post(f"/v1/agent/session/{session_id}/open", asked)
            assert (status, answer["error"]["retryable"]) == (503, True)
            assert sessions.counts()[0] == 0, "it is not placed here"

        for refusing in (gateway.unplaced, gateway.stale):
            session_id = new_session_id()
            refusing.add(session_id)
            await is_refused(session_id)
        asked, proceed = asyncio.Event(), asyncio.Event()
        transcript = GatewayClient.transcript

        async def slow(self: GatewayClient, *placement: Any) -> Transcript:
            asked.set()
            await proceed.wait()
            return await transcript(self, *placement)

        monkeypatch.setattr(GatewayClient, "transcript", slow)
        session_id = new_session_id()
        refused = asyncio.create_task(is_refused(session_id))
        await asked.wait()
        deleting = asyncio.create_task(sessions.delete(session_id))
        await until(lambda: sessions.counts()[0] == 0)
        proceed.set()
        await asyncio.gather(refused, deleting)


async def test_an_unchanged_workspace_is_not_sent_again(gateway: StandInGateway, tmp_path: Path) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as agent:
        await agent.chat(turn(tool("Write", file_path="a.txt", content="blue"), session_id))
        del gateway.workspaces[session_id]
        answer = await agent.chat(turn(tool("Bash", command="true"), session_id, number=2))
        assert answer["workspace_durable"]
        assert session_id not in gateway.workspaces


async def test_files_of_a_background_job_are_stored_by_a_turn_by_parking_and_by_a_drain(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    """Files that it writes after the last of these are lost if the agent is lost."""
    session_id, other = new_session_id(), new_session_id()
    job = "(for step in one two; do until test -e go.$step; do sleep 0.02; done; echo > $step; done; sleep 600)"
    async with served_agent(gateway, tmp_path / "one") as agent:
        files = workspace(agent, session_id)
        answer = await agent.chat(turn(tool("Bash", command=f"{job} > /dev/null 2>&1 &"), session_id))
        assert answer["workspace_durable"]
        (files / "go.one").touch()
        await until((files / "one").exists)
        assert stored_files(gateway, session_id) == set(), "files that are written between turns are on this agent only"
        answer = await agent.chat(turn("a turn that calls no tool", session_id, number=2))
        assert answer["workspace_durable"]
        assert stored_files(gateway, session_id) == {"go.one", "one"}
        (files / "go.two").touch()
        await until((files / "two").exists)
        assert await agent.server.enrolled().get(session_id).park()
        status, _ = await agent.post(f"/v1/agent/session/{session_id}/release")
        assert status == 200
        assert stored_files(gateway, session_id) == {"go.one", "one", "go.two", "two"}
        await agent.chat(turn("hello", other))
        url = f"{agent.url}/v1/agent/session/{other}/files/sent.txt"
        gateway.store_works = False
        async with agent.client.put(url, data=b"x", headers=agent.headers) as sent:
            assert (sent.status, (await sent.json())["workspace_durable"]) == (200, False)
        gateway.store_works = True
        assert other not in gateway.workspaces
        await agent.server.drain()
        assert stored_files(gateway, other) == {"sent.txt"}


async def test_a_returning_session_uses_the_stored_state_and_not_its_old_folder(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    write = tool("Bash", command="echo old > old.txt; echo old > both.txt; (sleep 600 > /dev/null 2>&1 &)")
    async with served_agent(gateway, tmp_path / "one") as one:
        await one.chat(turn(write, session_id))
        before = one.cli_pid(session_id)
        async with another_agent(gateway, tmp_path / "two") as two:
            rewrite = tool("Bash", command="rm old.txt; echo new > both.txt")
            await two.chat(turn(rewrite, session_id, number=2, generation=2))
            await two.chat(turn("remember the word cobalt", session_id, number=3, generation=2))
        answer = await one.chat(turn("[[recall 3]]", session_id, number=4, generation=3))
        assert "cobalt" in answer["content"]
        assert one.cli_pid(session_id) != before
        files = workspace(one, session_id)
        assert [path.name for path in files.iterdir()] == ["both.txt"]
        assert (files / "both.txt").read_text() == "new\n"
        assert (await one.post("/v1/agent/chat", turn("late", session_id, number=3)))[0] == 409
        assert one.server.enrolled().counts()[0] == 1


async def test_a_store_outage_delays_no_turn_and_the_state_is_stored_later(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as agent:
        gateway.store_works = False
        answer = await agent.chat(turn(tool("Write", file_path="a.txt", content="blue"), session_id))
        assert (answer["status"], answer["durable"], answer["workspace_durable"]) == ("completed", False, False)
        assert any("not in the store" in notice for notice in answer["notices"])
        gateway.store_works = True
        await until(lambda: gateway.transcripts.get(session_id))
        answer = await agent.chat(turn("and now?", session_id, number=2))
        assert (answer["durable"], answer["workspace_durable"]) == (True, True)
    async with another_agent(gateway, tmp_path / "two") as two:
        await two.chat(turn("hello", session_id, number=3, generation=2))
        assert (workspace(two, session_id) / "a.txt").read_text() == "blue"


async def test_a_turn_of_an_unplaced_session_is_refused_as_retryable_and_not_as_unknown(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    async with served_agent(gateway, tmp_path / "agent") as agent:
        body = turn("hello")
        gateway.unplaced.add(body["session_id"])
        status, answer = await agent.post("/v1/agent/chat", body)
        assert (status, answer["error"]["type"], answer["error"]["retryable"]) == (503, "unavailable", True)
        assert agent.server.enrolled().counts()[0] == 0


async def test_a_session_that_moved_to_another_agent_is_removed(gateway: StandInGateway, tmp_path: Path) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as agent:
        await agent.chat(turn("hello", session_id))
        gateway.stale.add(session_id)
        status, answer = await agent.post("/v1/agent/chat", turn("again", session_id, number=2))
        assert status == 409 or not answer["durable"]
        await until(lambda: agent.server.enrolled().counts()[0] == 0)


async def test_a_damaged_history_is_restored_up_to_its_last_complete_entry(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as one:
        await one.chat(turn("remember the word cobalt", session_id))
        await one.chat(turn("remember the word indigo", session_id, number=2))
    stored = gateway.transcripts[session_id]
    second = next(uuid for uuid, entry in stored.items() if "indigo" in entry.line)
    stored[second] = TranscriptEntry(uuid=second, line=stored[second].line[:40])
    async with another_agent(gateway, tmp_path / "two") as two:
        answer = await two.chat(turn("[[recall 1]]", session_id, number=3, generation=2))
        assert "cobalt" in answer["content"]
        assert any("damaged" in notice for notice in answer["notices"])


async def test_a_history_that_cannot_be_fetched_fails_the_turn_but_not_the_session(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as one:
        await one.chat(turn("remember the word cobalt", session_id))
    async with another_agent(gateway, tmp_path / "two") as two:
        gateway.store_works = False
        status, _ = await two.post("/v1/agent/chat", turn("[[recall 1]]", session_id, number=2, generation=2))
        assert status == 502
        gateway.store_works = True
        answer = await two.chat(turn("[[recall 1]]", session_id, number=3, generation=2))
        assert "cobalt" in answer["content"]


async def test_files_that_the_blob_store_lost_are_reported_as_not_retryable(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as one:
        await one.chat(turn(tool("Write", file_path="a.txt", content="blue"), session_id))
    gateway.lost_workspaces.add(session_id)
    async with another_agent(gateway, tmp_path / "two") as two:
        status, answer = await two.post("/v1/agent/chat", turn("go on", session_id, number=2, generation=2))
    assert (status, answer["error"]["type"], answer["error"]["retryable"]) == (500, "internal", False)
    assert "missing from the platform's blob store" in answer["error"]["message"]


async def test_a_workspace_over_its_limit_is_reported_as_not_durable(gateway: StandInGateway, tmp_path: Path) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one", workspace_max_mb=1) as agent:
        command = "head -c 3000000 /dev/urandom > big"
        answer = await agent.chat(turn(tool("Bash", command=command), session_id))
        assert (answer["durable"], answer["workspace_durable"]) == (True, False)
        assert any("WORKSPACE_MAX_MB" in notice for notice in answer["notices"])
        answer = await agent.chat(turn(tool("Bash", command="rm big"), session_id, number=2))
        assert answer["workspace_durable"]


async def test_a_workspace_with_too_many_files_is_neither_archived_nor_unpacked(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as one:
        await one.chat(turn(tool("Bash", command="mkdir d; touch d/a d/b"), session_id))
    async with another_agent(gateway, tmp_path / "two", workspace_max_files=2) as two:
        status, _ = await two.post("/v1/agent/chat", turn("hello", session_id, number=2, generation=2))
        assert status == 502, "the archive has three entries and this agent accepts two"
        other = new_session_id()
        answer = await two.chat(turn(tool("Bash", command="mkdir d; touch d/a d/b"), other))
        assert (answer["durable"], answer["workspace_durable"]) == (True, False)
        assert any("WORKSPACE_MAX_FILES" in notice for notice in answer["notices"])
        answer = await two.chat(turn(tool("Bash", command="rm d/b"), other, number=2))
        assert answer["workspace_durable"]


async def test_unreadable_files_are_named_and_make_the_workspace_not_durable(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = new_session_id()
    run_as = SharedUserIsolation.run_as
    unprivileged = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")  # otherwise root reads every file

    async def without_rights(
        self: SharedUserIsolation, folder: SessionFolder, argv: Sequence[str], **named: Any
    ) -> int:
        return await run_as(self, folder, (*unprivileged, *argv) if argv[0] == "tar" else argv, **named)

    monkeypatch.setattr(SharedUserIsolation, "run_as", without_rights)
    async with served_agent(gateway, tmp_path / "one") as agent:
        script = "echo k > a; for n in 1 2 3 4; do echo x > $n; done; mkdir d; chmod 000 a 1 2 d"
        answer = await agent.chat(turn(tool("Bash", command=script), session_id))
        assert (answer["durable"], answer["workspace_durable"]) == (True, False)
        [notice] = [notice for notice in answer["notices"] if "could not be read" in notice]
        assert notice.endswith(": 1, 2, a and 1 more")
        assert stored_files(gateway, session_id) >= {"3", "4"}, "the readable files are stored"
        answer = await agent.chat(turn("and now?", session_id, number=2))
        assert not answer["workspace_durable"], "the unreadable files are still missing"
        answer = await agent.chat(turn(tool("Bash", command="chmod 700 a 1 2 d"), session_id, number=3))
        assert (answer["workspace_durable"], answer["notices"]) == (True, [])
        assert stored_files(gateway, session_id) == {"1", "2", "3", "4", "a", "d"}


async def test_an_archive_that_outlasts_its_turn_continues_and_the_answer_says_so(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = new_session_id()
    proceed = asyncio.Event()
    put_workspace = GatewayClient.put_workspace

    async def slow(self: GatewayClient, *details: Any) -> str:
        await proceed.wait()
        return await put_workspace(self, *details)

    monkeypatch.setattr(GatewayClient, "put_workspace", slow)
    monkeypatch.setattr("hypercore_agents.agent.sessions.turn_storage.ARCHIVE_SECONDS", 0.05)
    monkeypatch.setattr("hypercore_agents.agent.sessions.turn_storage.LONGEST_ARCHIVE_SECONDS", 0.1)
    async with served_agent(gateway, tmp_path / "one") as agent:
        answer = await agent.chat(turn(tool("Bash", command="echo k > a"), session_id))
        assert (answer["durable"], answer["workspace_durable"]) == (True, False)
        assert any("continues" in notice for notice in answer["notices"])
        proceed.set()
        await until(lambda: not agent.server.enrolled().get(session_id).files.archive.changed)
        assert stored_files(gateway, session_id) == {"a"}


async def test_a_full_transcript_ends_at_a_complete_entry_and_the_answer_says_so(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as one:
        await one.chat(turn("remember the word cobalt", session_id))
        gateway.transcript_is_full = True
        answer = await one.chat(turn("remember the word indigo", session_id, number=2))
        assert (answer["status"], answer["durable"]) == ("completed", False)
        assert any("TRANSCRIPT_MAX_MB" in notice for notice in answer["notices"])
        gateway.transcript_is_full = False  # entries after a gap would be useless
        answer = await one.chat(turn("[[recall 2]]", session_id, number=3))
        assert "indigo" in answer["content"]
        assert not answer["durable"]
    async with another_agent(gateway, tmp_path / "two") as two:
        answer = await two.chat(turn("[[recall 1]]", session_id, number=4, generation=2))
        assert "cobalt" in answer["content"]
        assert not any("indigo" in entry.line for entry in gateway.transcripts[session_id].values())


@pytest.mark.parametrize("fails", [1, 2])
async def test_a_failed_start_does_not_replace_a_history_that_is_not_stored_completely(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    session_id = new_session_id()
    left = fails

    async def failing(*arguments: Any, **named: Any) -> ClaudeProcess:
        nonlocal left
        if left:
            left -= 1
            raise ClaudeEnded("no memory")
        return await start(*arguments, **named)

    async with served_agent(gateway, tmp_path / "one") as agent:
        await agent.chat(turn("remember the word cobalt", session_id))
        gateway.transcript_is_full = True
        await agent.chat(turn("remember the word indigo", session_id, number=2))
        assert await agent.server.enrolled().get(session_id).park()
        monkeypatch.setattr("hypercore_agents.agent.sessions.cli.start", failing)
        if fails == 2:
            assert (await agent.post("/v1/agent/chat", turn("hello", session_id, number=3)))[0] == 502
        answer = await agent.chat(turn("[[recall 2]]", session_id, number=4))
        assert "indigo" in answer["content"]
        assert left == 0


_LEAD_OUT = [
    ("../outside", None),
    ("/{folder}/outside", None),
    ("way", ".."),
    ("way", "/{folder}"),
    ("hard", "/{folder}/secret"),
    ("hard", "{folder}/secret"),
]


async def test_an_archive_with_paths_or_links_out_of_the_folder_reaches_nothing_outside(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    """A compromised agent may have stored such an archive."""
    folder = str(tmp_path).lstrip("/")
    (tmp_path / "secret").write_text("the canary")
    async with served_agent(gateway, tmp_path / "agent") as agent:
        for name, link in _LEAD_OUT:
            content, session_id = io.BytesIO(), new_session_id()
            with tarfile.open(fileobj=content, mode="w:gz") as archive:
                member = tarfile.TarInfo(name.format(folder=folder))
                if link is not None:
                    member.type = tarfile.LNKTYPE if name == "hard" else tarfile.SYMTYPE
                    member.linkname = link.format(folder=folder)
                archive.addfile(member)
                if name == "way":
                    archive.addfile(tarfile.TarInfo("way/outside"))
            digest = hashlib.sha256(content.getvalue()).hexdigest()
            gateway.workspaces[session_id] = (digest, content.getvalue())
            files = workspace(agent, session_id)
            status, _ = await agent.post("/v1/agent/chat", turn("hello", session_id, number=2, generation=2))
            assert status == (200 if name.startswith("/") else 502)
            outside = [
                path for path in entries_below(tmp_path) if path.name == "outside" and not path.is_relative_to(files)
            ]
            assert not [path for path in outside if "sessions" not in path.parts]
            assert not [path for path in files_below(files) if b"canary" in content_of(path)]


async def test_an_agent_releases_only_a_session_that_is_stored_completely(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as agent:
        await agent.chat(turn("remember the word cobalt", session_id))
        assert await agent.server.enrolled().get(session_id).park()
        status, _ = await agent.post(f"/v1/agent/session/{session_id}/release")
        assert status == 200
        assert agent.server.enrolled().counts()[0] == 0
        assert not workspace(agent, session_id).exists()
        answer = await agent.chat(turn("[[recall 1]]", session_id, number=2))
        assert "cobalt" in answer["content"], "a turn of the same placement, after the release"
        agent.server.enrolled().get(session_id).files.archive.note_change()
        (workspace(agent, session_id) / "new").touch()
        gateway.store_works = False
        status, error = await agent.post(f"/v1/agent/session/{session_id}/release")
        assert (status, error["error"]["type"]) == (409, "conflict")
        assert (await agent.post(f"/v1/agent/session/{new_session_id()}/release"))[0] == 404


async def test_a_session_is_not_released_while_a_file_is_written_or_read(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id, proceed = new_session_id(), asyncio.Event()

    async def slow_file() -> AsyncIterator[bytes]:
        yield b"the beginning"
        await proceed.wait()
        yield b" and the end"

    async with served_agent(gateway, tmp_path / "one") as agent:
        await agent.chat(turn("hello", session_id))
        session = agent.server.enrolled().get(session_id)
        url = f"{agent.url}/v1/agent/session/{session_id}/files/sent.txt"
        putting = asyncio.create_task(agent.client.put(url, data=slow_file(), headers=agent.headers))
        try:
            await until(lambda: session.files.archive.changed)
            status, error = await agent.post(f"/v1/agent/session/{session_id}/release")
        finally:
            proceed.set()
        assert (status, error["error"]["type"]) == (409, "conflict")
        async with await putting as answer:
            assert (answer.status, (await answer.json())["workspace_durable"]) == (200, True)
        assert (workspace(agent, session_id) / "sent.txt").read_bytes() == b"the beginning and the end"
        (workspace(agent, session_id) / "sent.txt").write_bytes(bytes(40_000_000))
        async with agent.client.get(url, headers=agent.headers) as answer:
            read = await answer.content.readexactly(1000)
            assert (await agent.post(f"/v1/agent/session/{session_id}/release"))[0] == 409
            read += await answer.content.read()
        assert read == bytes(40_000_000)
        await until(lambda: session.files.transfers == 0)
        assert (await agent.post(f"/v1/agent/session/{session_id}/release"))[0] == 200


async def test_changes_during_an_archive_are_stored_by_a_release_by_a_drain_and_by_a_turn(
    gateway: StandInGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, proceed = asyncio.Event(), asyncio.Event()
    put_workspace = GatewayClient.put_workspace

    async def slow(self: GatewayClient, *details: Any) -> str:
        sent.set()
        await proceed.wait()
        return await put_workspace(self, *details)

    monkeypatch.setattr(GatewayClient, "put_workspace", slow)

    def puts(agent: Agent, session_id: str) -> asyncio.Task[int]:
        async def put() -> int:
            url = f"{agent.url}/v1/agent/session/{session_id}/files/sent.txt"
            async with agent.client.put(url, data=b"x", headers=agent.headers) as answer:
                return answer.status

        sent.clear()
        proceed.clear()
        return asyncio.create_task(put())

    released, talking, drained = new_session_id(), new_session_id(), new_session_id()
    async with served_agent(gateway, tmp_path / "one") as agent:
        sessions = agent.server.enrolled()
        for session_id in (released, talking, drained):
            await agent.chat(turn("hello", session_id))

        putting = puts(agent, released)
        await sent.wait()
        releasing = asyncio.create_task(sessions.release(released))
        await asyncio.wait((releasing,), timeout=0.1)
        assert not releasing.done(), "the file is not stored yet"
        proceed.set()
        await releasing
        assert await putting == 200
        assert stored_files(gateway, released) == {"sent.txt"}

        putting = puts(agent, talking)
        await sent.wait()
        (workspace(agent, talking) / "late.txt").touch()  # as a job would that ends before the turn
        sessions.get(talking).files.archive.may_be_written_late = True
        answering = asyncio.create_task(agent.chat(turn("and now?", talking, number=2)))
        await until(lambda: not sessions.get(talking).files.archive.may_be_written_late)
        proceed.set()
        assert (await answering)["workspace_durable"]
        assert await putting == 200
        assert stored_files(gateway, talking) == {"sent.txt", "late.txt"}

        putting = puts(agent, drained)
        await sent.wait()
        draining = asyncio.create_task(agent.server.drain())
        await asyncio.wait((draining,), timeout=0.1)
        assert not draining.done()
        proceed.set()
        await draining
        assert await putting == 200
        assert stored_files(gateway, drained) == {"sent.txt"}


async def test_a_reconnected_stream_continues_where_it_broke_off(gateway: StandInGateway, tmp_path: Path) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as agent:
        body = turn("[[say one two three four]]", session_id, stream=True)
        async with agent.client.post(agent.url + "/v1/agent/chat", json=body, headers=agent.headers) as answer:
            whole = [frame async for frame in frames(answer)]
        headers = {**agent.headers, "Last-Event-ID": whole[1].id}
        url = f"{agent.url}/v1/agent/session/{session_id}/events/stream"
        again = []
        async with agent.client.get(url, headers=headers) as answer:
            async for frame in frames(answer):
                again.append(frame)
                if frame.event == "result":
                    break
        assert again == whole[2:]


async def test_the_log_has_each_streamed_event_once_and_ids_continue_on_another_agent(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()

    def logged() -> list[tuple[str, str]]:
        return [(event.name, f"{event.generation}.{event.sequence}") for event in gateway.events[session_id]]

    async with served_agent(gateway, tmp_path / "one") as agent:
        prompt = f"[[say one two]] {tool('Bash', command='true')}"
        seen = await agent.stream(turn(prompt, session_id, stream=True))
        status, log = await agent.get(f"/v1/agent/session/{session_id}/events")
        assert status == 200
        shown = [(event["event"], event["id"]) for event in log["events"]]
        assert shown == logged()
        whole = [(frame.event, frame.id) for frame in seen if frame.event not in ("delta", "text")]
        assert [event for event in shown if event[0] != "text"] == whole
        texts = [event["data"]["text"] for event in log["events"] if event["event"] == "text"]
        assert "".join(texts) == "".join(frame.data["text"] for frame in seen if frame.event == "delta")
        assert (await agent.post(f"/v1/agent/session/{session_id}/release"))[0] == 200
        again = await agent.stream(turn("hello", session_id, number=2, stream=True))
        last = [int(frames[position].id.split(".")[1]) for frames, position in ((seen, -1), (again, 0))]
        assert (again[0].id.split(".")[0], last[1]) == ("1", last[0] + 1)
    async with another_agent(gateway, tmp_path / "two") as two:
        moved = await two.stream(turn("hello", session_id, number=3, generation=2, stream=True))
        assert (moved[0].event, moved[0].id) == ("session", "2.1")
        await until(lambda: logged()[-1] == ("result", moved[-1].id))
    numbers = [tuple(map(int, event_id.split("."))) for _, event_id in logged()]
    assert numbers == sorted(set(numbers))


async def test_a_turn_that_was_lost_with_its_agent_ends_in_the_log_with_an_error(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as one:
        await one.chat(turn("hello", session_id))
        await until(lambda: gateway.events[session_id][-1].name == "result")
    gateway.events[session_id].pop()
    async with another_agent(gateway, tmp_path / "two") as two:
        seen = await two.stream(turn("hello", session_id, number=2, generation=2, stream=True))
        assert seen[0].event == "session", "the stream of this turn does not contain the end of another turn"
        await until(lambda: gateway.events[session_id][-1].name == "result")
    moved = [event for event in gateway.events[session_id] if event.generation == 2]
    assert [event.name for event in moved[:2]] == ["error", "session"]
    assert "agent_unreachable" in moved[0].data


async def test_all_events_are_stored_after_a_store_outage(gateway: StandInGateway, tmp_path: Path) -> None:
    session_id = new_session_id()
    async with served_agent(gateway, tmp_path / "one") as agent:
        gateway.store_works = False
        answer = await agent.chat(turn("hello", session_id))
        assert (answer["status"], answer["durable"]) == ("completed", False)
        gateway.store_works = True
        await until(
            lambda: [event.name for event in gateway.events.get(session_id, [])] == ["session", "text", "result"]
        )
