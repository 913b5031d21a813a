"""The commands that use a manager, as processes against a manager with stand-in agents."""

import asyncio
import json
import os
import pty
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog.testing
from aiohttp import web
from joserfc import jwt
from joserfc.jwk import OctKey

from hypercore_agents.store import stored_bytes, transcripts
from hypercore_agents.store.blobs import owner_of
from hypercore_agents.store.transcripts import EntryRow
from support.command_line import Ended, command
from support.manager_server import Deployment, StandInAgent, completed, deployed, frame

CANARY = "sk-ant-canary-77c1e05b2f9d4a60"


async def start(folder: Path, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
    inherited = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG")}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hypercore_agents", *arguments, cwd=folder,
        env={**inherited, "HOME": str(folder), "HYPERCORE_AGENTS_USER": "ada", **environment},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def run(folder: Path, *arguments: str, given: str = "", **environment: str) -> Ended:
    return await asyncio.to_thread(command, *arguments, given=given, HOME=str(folder), **environment)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and keep the log of this process's manager out of the commands' output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYPERCORE_AGENTS_USER", "ada")
    with structlog.testing.capture_logs():
        yield


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state") as deployment:
        yield deployment


async def test_agent_commands_from_spawn_to_delete(site: Deployment, tmp_path: Path) -> None:
    manager = {"HYPERCORE_AGENTS_URL": site.url}
    spawned = await run(
        tmp_path, "spawn", "--cores", "1", "--memory", "512", "--tag", "team=blue", "--key-stdin", "--json",
        "--options", '{"max_turns": 3}', given=f"{CANARY}\n", **manager,
    )  # fmt: skip
    assert spawned.code == 0, spawned.err
    agent_id = spawned.json["agent_id"]
    assert (spawned.json["user_id"], spawned.json["memory"], spawned.json["tags"]) == ("ada", 512, {"team": "blue"})
    site.host.print(agent_id, b"one\ntwo\nthree\n")

    listed = await run(tmp_path, "list", "--url", site.url)
    assert [agent_id in listed.out, "0/100" in listed.out, "running" in listed.out] == [True] * 3
    assert all(line == line.rstrip() for line in listed.out.splitlines()), "a pipe gets no trailing padding"
    assert (await run(tmp_path, "list", "--json", **manager)).json["count"] == 1
    assert agent_id in (await run(tmp_path, "get", agent_id, **manager)).out
    assert (await run(tmp_path, "stats", "--json", **manager)).json["agents_per_user"] == {"ada": 1}
    async with site.database.write() as connection:
        await stored_bytes.set_stored(connection, owner_of("ada"), "ada", 3 << 20)
    counted = " ".join((await run(tmp_path, "stats", **manager)).out.split())
    assert "agents of ada 1 " in counted
    assert "start wait unknown " in counted
    assert "storage of ada 3.0 MB of 10240.0 MB" in counted
    assert "places none in use; a user may have" in counted
    assert "archived workspaces: 3.0 MB of 10240 MB" in (await run(tmp_path, "usage", "--user", "ada", **manager)).out
    assert "memory given" in counted
    assert "memory used" not in counted, "this host does not measure it"
    site.host.charged_mb = {agent_id: 77, "templates": 40}
    counts = [line.split() for line in (await run(tmp_path, "stats", **manager)).out.splitlines()]
    assert ["memory", "used", "117", "MB"] in counts
    assert ["memory", "of", "templates", "40", "MB", "used,", "100", "MB", "allocated"] in counts
    assert ["memory", "of", agent_id, "77", "MB", "used,", "512", "MB", "allocated"] in counts
    logs = await run(tmp_path, "logs", agent_id, "--tail", "2", **manager)
    assert logs.out == "two\nthree\n"

    said = await run(tmp_path, "chat", "hello", "--agent", agent_id, "--json", **manager)
    assert said.json["content"] == "you said hello"
    session_id = said.json["session_id"]
    call = {"type": "tool_use", "name": "Bash", "input": {"command": "ls"}}
    lines = [
        {"type": "user", "message": {"content": "look \x1b]0;owned\x07"}},
        {"type": "assistant", "message": {"content": [call]}},
        {"type": "user", "message": {"content": [{"type": "tool_result", "content": "one\ntwo", "is_error": True}]}},
    ]
    async with site.database.write() as connection:
        rows = [EntryRow("", str(number), json.dumps(line)) for number, line in enumerate(lines)]
        await transcripts.append(connection, session_id, rows)
    shown = await run(tmp_path, "get", session_id, **manager)
    assert session_id in shown.out
    assert "0.000000 USD" in shown.out
    assert "earlier messages" not in shown.out
    conversation = shown.out.partition("\n\n")[2]
    assert conversation == (
        'user\n  look ]0;owned\n\nassistant\n  calls Bash {"command": "ls"}\n\nuser\n  error: one\n  two\n'
    )
    newest = await run(tmp_path, "get", session_id, "--history", "1", **manager)
    assert [word in newest.out for word in ("error: one", "earlier messages: --before ", "look")] == [True, True, False]
    wrong = await run(tmp_path, "get", agent_id, "--history", "1", **manager)
    assert (wrong.code, "are for a session" in wrong.err) == (2, True)
    assert (await run(tmp_path, "usage", "--json", **manager)).json["rows"] == []

    deleted = await run(tmp_path, "delete", agent_id, **manager)
    assert "stopped" in deleted.out
    gone = await run(tmp_path, "list", **manager)
    assert (gone.out, gone.code) == ("", 0)
    assert "no agents" in gone.err
    for shown in (spawned, listed, logs, said, deleted):
        assert CANARY not in shown.out + shown.err


@pytest.mark.parametrize("as_json", [False, True])
async def test_logs_follow_until_the_agent_is_deleted(site: Deployment, tmp_path: Path, as_json: bool) -> None:
    agent_id = (await run(tmp_path, "spawn", "--json", "--url", site.url)).json["agent_id"]
    site.host.print(agent_id, "null\none \u20ac\n".encode())
    wanted = ["-f", *(("--json",) if as_json else ()), "--tail", "1"]
    following = await start(tmp_path, "logs", *wanted, agent_id, "--url", site.url)
    assert following.stdout is not None

    async def line() -> str:
        assert following.stdout is not None
        text = (await following.stdout.readline()).decode().rstrip("\n")
        if not as_json:
            return text
        found = json.loads(text)
        assert found["agent_id"] == agent_id
        return str(found["line"])

    async with asyncio.timeout(60):
        assert await line() == "one \u20ac"
        site.host.print(agent_id, b"one \xe2\x82")  # an incomplete UTF-8 sequence is held until it is complete
        site.host.print(agent_id, b"\xac\ntwo\n")
        assert [await line(), await line()] == ["one \u20ac", "two"]
        assert (await run(tmp_path, "delete", agent_id, "--url", site.url)).code == 0
        assert await following.wait() == 0


def streaming(agent: StandInAgent, pieces: list[bytes], *, until_interrupted: bool = False) -> Any:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        session_id, turn = body["placement"]["session_id"], body["placement"]["turn"]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        started = {"session_id": session_id, "agent_id": agent.agent_id, "turn": turn, "tools": True, "notices": []}
        await response.write(frame("session", started))
        for piece in pieces:
            await response.write(piece)
        while until_interrupted and session_id not in agent.interrupted:
            await asyncio.sleep(0.01)
        status = "interrupted" if until_interrupted else "completed"
        await response.write(frame("result", {**completed(agent, body), "status": status}))
        return response

    return answer


async def test_chat_prints_text_to_stdout_and_tools_to_stderr(site: Deployment, tmp_path: Path) -> None:
    pieces = [
        frame("delta", {"text": "let me "}),
        frame("tool_use", {"tool_use_id": "t1", "name": "Bash", "input": {"command": "ls"}}),
        frame("tool_result", {"tool_use_id": "t1", "content": "a.txt", "is_error": False}),
        frame("delta", {"text": "see"}),
    ]
    site.agents.prepare = lambda agent: setattr(agent, "answer", streaming(agent, pieces))
    agent_id = (await run(tmp_path, "spawn", "--json", "--url", site.url)).json["agent_id"]
    said = await run(tmp_path, "chat", "hello", "--agent", agent_id, "--url", site.url)
    assert (said.code, said.out) == (0, "let me see\n")
    assert 'Bash {"command": "ls"}' in said.err
    assert "✓ a.txt" in said.err
    session = site.agents.running[agent_id].chats[0]["placement"]["session_id"]
    again = await run(tmp_path, "chat", "-", "--session", session, "--url", site.url, given="from a pipe")
    assert again.code == 0, again.err
    assert site.agents.running[agent_id].chats[1]["prompt"] == "from a pipe"


async def test_ctrl_c_interrupts_the_turn_and_waits_for_its_result(site: Deployment, tmp_path: Path) -> None:
    site.agents.prepare = lambda agent: setattr(
        agent, "answer", streaming(agent, [frame("delta", {"text": "endless\n"})], until_interrupted=True)
    )
    agent_id = (await run(tmp_path, "spawn", "--json", "--url", site.url)).json["agent_id"]
    process = await start(tmp_path, "chat", "hello", "--agent", agent_id, "--url", site.url)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"endless\n"
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 130
    assert len(site.agents.running[agent_id].interrupted) == 1
    assert "interrupted" in err.decode()
    assert site.agents.running[agent_id].disconnected == 0


async def test_interactive_chat_survives_ctrl_c(site: Deployment, tmp_path: Path) -> None:
    def prepare(agent: StandInAgent) -> None:
        quick = streaming(agent, [frame("delta", {"text": "an answer"})])
        endless = streaming(agent, [frame("delta", {"text": "endless"})], until_interrupted=True)

        call = {
            "approval_id": str(uuid.uuid4()),
            "tool_use_id": "t1",
            "name": "Bash",
            "input": {"command": "ls"},
            "expires_at": "x",
        }
        asking = streaming(agent, [frame("approval_request", call), frame("delta", {"text": "\x1b[31mdenied"})])

        async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            which = {"write without an end": endless, "ask me": asking}.get(body["prompt"], quick)
            response: web.StreamResponse = await which(request, body)
            return response

        agent.answer = answer

    site.agents.prepare = prepare
    agent_id = (await run(tmp_path, "spawn", "--json", "--url", site.url)).json["agent_id"]
    terminal, side = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hypercore_agents", "chat", "--agent", agent_id, "--user", "ada", "--url", site.url,
        stdin=side, stdout=side, stderr=side, cwd=tmp_path, start_new_session=True,
        env={**environment, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"},
    )  # fmt: skip
    os.close(side)
    seen = everything = ""

    async def until_seen(text: str) -> None:
        nonlocal seen, everything
        async with asyncio.timeout(60):
            while text not in seen:
                piece = (await asyncio.to_thread(os.read, terminal, 4096)).decode(errors="replace")
                seen, everything = seen + piece, everything + piece
        seen = seen.partition(text)[2]

    try:
        await until_seen("> ")
        os.write(terminal, b"hello\n")
        await until_seen("an answer")
        await until_seen("> ")
        os.write(terminal, b"write without an end\n")
        await until_seen("endless")
        process.send_signal(signal.SIGINT)
        await until_seen("interrupted")
        await until_seen("> ")
        os.write(terminal, b"ask me\n")
        await until_seen("[y/N]")
        os.write(terminal, b"\x04")  # Ctrl-D: no
        await until_seen("not_found")  # the decision is too late: nothing waits for it, and the turn continues
        await until_seen("[31mdenied")
        assert "\x1b[31m" not in everything
        await until_seen("> ")
        os.write(terminal, b"hello again\n")
        await until_seen("an answer")
        await until_seen("> ")
        os.write(terminal, b"/exit\n")
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(terminal)
    chats = site.agents.running[agent_id].chats
    assert [chat["prompt"] for chat in chats] == ["hello", "write without an end", "ask me", "hello again"]
    assert len({chat["placement"]["session_id"] for chat in chats}) == 1
    history = tmp_path / "hypercore-agents" / "chat-history"
    assert "write without an end" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


async def test_errors_are_one_line_with_a_remedy_and_an_exit_code(site: Deployment, tmp_path: Path) -> None:
    refused = await run(tmp_path, "get", "agent-0000000000000000", "--url", site.url)
    assert (refused.code, refused.out) == (1, "")
    assert "not_found" in refused.err
    assert "Traceback" not in refused.err
    unreachable = await run(tmp_path, "stats", "--url", "http://127.0.0.1:9")
    assert unreachable.code == 3
    assert "hypercore-agents up" in unreachable.err
    for wrong in (("spawn", "--tag", "blue"), ("spawn", "--options", "[]")):
        ended = await run(tmp_path, *wrong, "--url", site.url)
        assert (ended.code, ended.out) == (2, ""), wrong
    nonsense = await run(tmp_path, "stats", "--url", "127.0.0.1:8080")
    assert (nonsense.code, "like http://127.0.0.1:8080" in nonsense.err) == (2, True)
    empty = await run(tmp_path, "chat", "  ", "--url", site.url)
    assert (empty.code, "the prompt is empty" in empty.err) == (2, True)


async def test_logs_are_bounded_and_private_to_their_owner(tmp_path: Path) -> None:
    secret = "0123456789abcdef0123456789abcdef"

    def as_user(name: str) -> dict[str, str]:
        claims = {"sub": name, "scope": "user", "exp": int(time.time()) + 600}
        return {"authorization": f"Bearer {jwt.encode({'alg': 'HS256'}, claims, OctKey.import_key(secret))}"}

    async with deployed(tmp_path / "state", enable_auth=True, jwt_secret=secret) as site:
        status, agent = await site.call("POST", "/v1/agents/spawn", {"user_id": "ada"}, headers=as_user("ada"))
        assert status == 200
        agent_id = agent["agent_id"]
        site.host.print(agent_id, b"0123456789")
        assert await site.call("GET", "/v1/agents/logs", headers=as_user("ada"), agent_id=agent_id, limit="4") == (
            200, "6789",
        )  # fmt: skip
        status, _ = await site.call("GET", "/v1/agents/logs", headers=as_user("bob"), agent_id=agent_id)
        assert status == 404
        status, body = await site.call(
            "GET", "/v1/agents/logs", headers=as_user("ada"), agent_id=agent_id, limit="99999999"
        )
        assert (status, body["error"]["details"]["field"]) == (400, "limit")


async def test_config_show_lists_sources_and_masks_secrets(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MIN_AGENTS=3\nANTHROPIC_API_KEY={CANARY}\n")
    secret = "0123456789abcdef0123456789abcdef"
    shown = await run(
        tmp_path, "config", "show", "--json", LOG_LEVEL="DEBUG", JWT_SECRET=secret,
        DATABASE_URL=f"postgresql+psycopg://u:{CANARY}@127.0.0.1/x",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    rows = {row["name"]: row for row in shown.json}
    assert (rows["MIN_AGENTS"]["value"], rows["MIN_AGENTS"]["source"]) == ("3", ".env")
    assert rows["LOG_LEVEL"] == {
        "name": "LOG_LEVEL", "value": "DEBUG", "source": "environment", "roles": ["manager", "gateway", "autoscaler"]
    }  # fmt: skip
    assert rows["MAX_AGENTS"]["source"] == "default"
    assert rows["ANTHROPIC_API_KEY"]["source"] == ".env"
    assert "u:********@" in rows["DATABASE_URL"]["value"]
    table = await run(tmp_path, "config", "show", JWT_SECRET=secret)
    for text in (shown.out, table.out):
        assert CANARY not in text
        assert secret not in text


async def test_doctor_reports_problems_with_remedies(tmp_path: Path) -> None:
    state = {"STATE_DIR": str(tmp_path / "state"), "LISTEN_ADDR": "127.0.0.1:9", "GATEWAY_ADDR": "127.0.0.1:19"}
    well = await run(tmp_path, "doctor", "--json", **state)
    findings = {finding["name"]: finding for finding in well.json}
    assert well.code == 0, well.out
    assert findings["claude cli"]["state"] == "ok"
    assert findings["claude api key"]["state"] == "warning"
    assert "--demo" in findings["claude api key"]["remedy"]
    for name in ("backend", "isolation", "accelerator", "descriptors", "clock", "manager", "gateway", "python"):
        assert name in findings
    assert findings["accelerator"]["found"].startswith(("kvm: ", "tcg: ", "unknown"))
    async with deployed(tmp_path / "other") as site:
        ours = await run(tmp_path, "doctor", "--json", **{**state, "LISTEN_ADDR": site.url.removeprefix("http://")})
        assert "answers at" in {f["name"]: f for f in ours.json}["manager"]["found"]
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        taken = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ill = await run(tmp_path, "doctor", "--json", **{**state, "GATEWAY_ADDR": taken})
        assert ill.code == 1
        assert "GATEWAY_ADDR" in {f["name"]: f for f in ill.json}["gateway"]["remedy"]


async def test_help_and_completion_import_no_large_modules(tmp_path: Path) -> None:
    heavy = (
        "rich",
        "pydantic",
        "aiohttp",
        "fastapi",
        "sqlalchemy",
        "claude_agent_sdk",
        "cryptography",
        "uvicorn",
        "dotenv",
    )
    code = (
        "import sys\nfrom hypercore_agents.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"import json\nprint(json.dumps([m for m in {heavy!r} if m in sys.modules]), file=sys.stderr)"
    )
    for argument in ("--help", "chat --help"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, *argument.split(),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert b"Usage" in out
        # typer itself loads pydantic as soon as a subcommand is named
        assert set(json.loads(err)) <= ({"pydantic"} if " " in argument else set())
    script = Path(sys.executable).parent / "hypercore-agents"
    process = await asyncio.create_subprocess_exec(
        script, stdout=asyncio.subprocess.PIPE,
        env={
            **os.environ, "_HYPERCORE_AGENTS_COMPLETE": "complete_bash", "COMP_WORDS": "hypercore-agents doc",
            "COMP_CWORD": "1",
        },
    )  # fmt: skip
    out, _ = await process.communicate()
    assert out.decode().split() == ["doctor"]
