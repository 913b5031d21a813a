"""Sessions in sandboxes of their own: the real launcher, the real CLI, and tools that try to get out. Needs root.

One agent serves the module; every test has sessions of its own on it.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.agent.launcher.client import LauncherClient, LaunchFailed
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import AgentConfiguration
from hypercore_agents.kit.linux import cgroups
from hypercore_agents.store.database import sqlite_url
from support.agent_server import (
    FIRST_USER,
    MODEL,
    Agent,
    exact_disks,
    launched,
    served_agent,
    stand_in_gateway,
    tool,
    turn,
)
from support.gateway_server import gateway_site
from support.isolation_marks import needs_isolation
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

GROUPS = cgroups.detect()
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.root,
    needs_isolation,
]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agent") / "state"


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skills")
    (folder / "knots").mkdir()
    (folder / "knots" / "SKILL.md").write_text("---\nname: knots\ndescription: Ties knots.\n---\nTie a bowline.\n")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)  # so that nothing but the mount keeps a session from writing
    return folder


@pytest.fixture(scope="module")
def launcher(state: Path, skills: Path) -> Iterator[LauncherClient]:
    with launched(
        state, "--session-memory-mb", "640", "--session-processes", "128", "--session-disk-mb", "64",
        "--session-files", "2000", skills=skills,
    ) as client:  # fmt: skip
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(
    simulator_process: RunningSimulator, state: Path, launcher: LauncherClient, skills: Path
) -> AsyncIterator[Agent]:
    async with (
        stand_in_gateway(simulator_process.url) as gateway,
        served_agent(gateway, state, launcher, skills_dir=skills) as agent,
    ):
        yield agent


async def bash(agent: Agent, script: str, session_id: str | None = None, *, number: int = 1, **options: Any) -> str:
    """Let the model call Bash in a session; return what the script printed."""
    body = turn(tool("Bash", command=script), session_id, number=number, timeout=60, **options)
    answer = await agent.chat(body)
    assert answer["tools"], answer
    return str(answer["content"])


def host_pids(uid: int) -> set[int]:
    """Pids of what runs as this user, as root outside sees them."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                found.add(int(entry.name))
    return found


async def uid_said_by(agent: Agent, session_id: str) -> int:
    return int((await bash(agent, "echo uid=$(id -u).", session_id)).partition("uid=")[2].split(".")[0])


async def test_a_session_has_a_user_of_its_own_no_rights_and_a_view_of_its_own(agent: Agent, state: Path) -> None:
    one, other = new_session_id(), new_session_id()
    assert await uid_said_by(agent, one) != await uid_said_by(agent, other)
    seen = await bash(
        agent,
        f"grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups)' /proc/self/status; ls -d {state} / /root /home /work 2>&1; "
        "stat -c %a $HOME $CLAUDE_CONFIG_DIR $PWD; touch /usr/x /etc/x 2>&1; unshare -Ur true 2>&1; "
        "ls /session/../ | tr '\\n' ' '; echo; pwd",
        one, number=2,
    )  # fmt: skip
    for expected in ("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2",
                     f"cannot access '{state}'", "700\n700\n700", "Read-only file system", "Operation not permitted",
                     "/session/workspace"):  # fmt: skip
        assert expected in seen, seen
    assert re.search(r"Groups:\s*(\\n|\n)", seen), seen


def python(script: str, *arguments: object) -> str:
    """Return a shell's command that runs a script, whatever is in it."""
    encoded = base64.b64encode(script.encode()).decode()
    return f'python3 -c "$(echo {encoded} | base64 -d)" {" ".join(map(str, arguments))}'


_LISTENS = r"""
import socket, time
sockets = []
for family, address in ((1, "\0canary"), (1, "/tmp/canary.sock"), (2, ("127.0.0.1", 7341))):
    sockets.append(socket.socket(family))
    sockets[-1].bind(address)
    sockets[-1].listen()
open("listening", "w").close()
time.sleep(600)
"""
_REACHES = r"""
import ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, call):
    try:
        print(what, "REACHED", call())
    except OSError as error:
        print(what, error.strerror)
for pid in map(int, sys.argv[2:]):
    if os.path.exists(f"/proc/{pid}") and os.stat(f"/proc/{pid}").st_uid == os.getuid():
        print("memory: -1 trace: -1 (a process of our own has this number here)")
        continue
    for name in ("cmdline", "environ", "mem", "maps", "fd/1", "cwd/note.txt", "root/session/config"):
        attempt(f"{name}:", lambda: open(f"/proc/{pid}/{name}", "rb").read(9))
    attempt("signal:", lambda: os.kill(pid, signal.SIGKILL))
    attempt("pidfd:", lambda: os.pidfd_open(pid))
    buffer = ctypes.create_string_buffer(8)
    iov = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
    print("memory:", libc.process_vm_readv(pid, iov, 1, iov, 1, 0), "trace:", libc.ptrace(16, pid, 0, 0))
for family, address in ((1, "\0canary"), (1, "/tmp/canary.sock"), (2, ("127.0.0.1", 7341))):
    attempt("socket:", lambda: socket.socket(family).connect(address))
for path in sys.argv[1].split(","):
    attempt("path:", lambda: os.listdir(path))
print("shared memory:", os.listdir("/dev/shm"), "scratch:", os.listdir("/tmp"), "folder:", os.listdir("/session"))
"""


async def test_another_sessions_files_memory_transcript_and_sockets_are_out_of_reach(agent: Agent, state: Path) -> None:
    one, other = new_session_id(), new_session_id()
    secret = "the-canary-of-the-other-7341"
    await bash(
        agent,
        f"echo {secret} > note.txt; cp note.txt /tmp; cp note.txt /dev/shm; export CANARY={secret}; "
        f"{python(_LISTENS, secret)} > /dev/null 2>&1 & "
        "until test -e listening; do sleep 0.05; done",
        one, system_prompt=secret,
    )  # fmt: skip
    pids = host_pids(await uid_of(agent, one))
    assert len(pids) >= 3
    # by the paths that root outside knows, and those that would be there without a root of its own
    paths = [state / "sessions" / one / "config", state / "sessions" / one, f"/session/../{one}"]
    seen = await bash(
        agent,
        f"{python(_REACHES, ','.join(map(str, paths)), *pids)}; "
        "grep -rsl the-canary-of / --include=* --exclude-dir=proc --exclude-dir=usr --exclude-dir=etc "
        "--exclude-dir=opt --exclude-dir=config | head -3; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null "
        "| tr '\\0' '\\n' | grep -c of-the-other; grep -c @canary /proc/net/unix; exit 0",
        other,
    )  # fmt: skip
    assert secret not in seen
    assert "REACHED" not in seen, seen
    assert seen.count("memory: -1 trace: -1") == len(pids), seen
    assert seen.count("socket:") == 3
    assert seen.count("path: No such file or directory") == 3, seen
    assert "shared memory: [] scratch:" in seen
    status, _ = await agent.post("/v1/agent/chat", turn(tool("Bash", command="kill -9 -1"), other, number=2))
    assert status == 502  # its own CLI is all that it reached
    assert host_pids(await uid_of(agent, one)) >= pids


async def uid_of(agent: Agent, session_id: str) -> int:
    return os.stat(f"/proc/{agent.cli_pid(session_id)}").st_uid


async def test_only_the_model_routes_can_be_reached(agent: Agent) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        body = json.dumps({"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "reached"}]})
        script = (
            'call() { curl -s -m 5 -o /tmp/answer -w \'%{http_code} \' "$@"; echo "$?;"; }; U=http://127.0.0.1:8090; '
            f"call http://127.0.0.1:{port}/; call {agent.gateway.url}/v1/messages; call http://169.254.169.254/; "
            "call $U/internal/session-tokens -d '{}'; call $U/v1/messages/../../internal/enrol --path-as-is -d '{}'; "
            "call $U/v1/messages -H 'transfer-encoding: chunked' -d '{}'; call $U/v1/files; "
            "getent hosts example.com; H='content-type: application/json'; V='anthropic-version: 2023-06-01'; "
            f'call $U/v1/messages -H "$H" -H "$V" -d \'{body}\'; cat /tmp/answer'
        )
        seen = await bash(agent, script)
    assert "000 7;\n000 7;\n000 7;\n403 0;\n403 0;\n403 0;\n403 0;\n200 0;\n" in seen, seen
    assert "reached" in seen
    assert agent.gateway.model_tokens[-1] in agent.gateway.session_tokens


async def test_the_credential_is_nowhere_inside(agent: Agent) -> None:
    session_id = new_session_id()
    await bash(agent, "true", session_id)
    token = agent.gateway.model_tokens[-1]
    assert token in agent.gateway.session_tokens
    hidden = base64.b64encode(token.encode()).decode()  # or the transcript would hold it
    looking = f"grep -rac $(echo {hidden} | base64 -d) /session /proc/[0-9]*/environ"
    seen = await bash(agent, looking, session_id, number=2)
    assert ":0" in seen
    assert not [line for line in seen.splitlines() if line.rpartition(":")[2].isdigit() and not line.endswith(":0")]


async def test_what_a_tool_leaves_running_ends_with_parking_and_deleting(agent: Agent) -> None:
    session_id = new_session_id()
    daemon = "setsid sh -c 'trap \"\" TERM HUP; exec env -i sleep 600' > /dev/null 2>&1 < /dev/null & cd /; echo ok"
    await bash(agent, "true", session_id)
    session = agent.server.enrolled().get(session_id)
    assert (session.files.archive.changed, session.files.archive.may_be_written_late, session.jobs.running) == (
        False,
        False,
        False,
    )
    await bash(agent, daemon, session_id, number=2)
    assert (session.files.archive.changed, session.files.archive.may_be_written_late) == (True, True), (
        "the daemon may go on writing"
    )
    assert session.jobs.running
    uid = await uid_of(agent, session_id)
    await until(lambda: len(host_pids(uid)) >= 3)  # init, CLI, daemon
    assert await session.park()
    assert host_pids(uid) == set()
    answer = await agent.chat(turn(tool("Bash", command=daemon), session_id, number=3, timeout=60))
    assert answer["notices"] == ["background processes of the session were ended: the session was parked"]
    assert await uid_of(agent, session_id) == uid
    status, said = await agent.delete(f"/v1/agent/session/{session_id}")
    assert (status, len(said["notices"])) == (200, 1)
    assert host_pids(uid) == set()
    assert not list((agent.state / "sessions").glob(f"{session_id}*"))


async def test_a_fork_bomb_a_memory_hog_and_an_endless_file_hurt_their_own_session_only(agent: Agent) -> None:
    neighbour = new_session_id()
    await bash(agent, "echo I am here", neighbour)
    pid = agent.cli_pid(neighbour)
    # The bomb is cleared away in the same call, or the CLI might not get a thread that it needs to go on.
    clear = "for p in /proc/[0-9]*; do read -r c < $p/comm && test $c = sleep && kill -9 ${p#/proc/}; done 2> /dev/null"
    bombs = {
        f"sh -c 'for i in $(seq 400); do sleep 99 > /dev/null 2>&1 & done' 2>&1; {clear}; true": "Cannot fork",
        "head -c 1G /dev/zero > big": "No space left on device" if exact_disks() else "",
        "head -c 900M /dev/zero > /dev/shm/big; ls -l /dev/shm | grep -c 134217728": "1",
        "python3 -c 'x = bytearray(900 << 20); print(\"got it all\")'": "",
    }
    for number, (script, expected) in enumerate(bombs.items(), 2):
        victim = new_session_id()
        status, answer = await agent.post("/v1/agent/chat", turn(tool("Bash", command=script), victim, timeout=60))
        # The kernel may choose the CLI among what there is in the session's group.
        assert status == 200 or (status == 502 and not expected), answer
        assert expected in str(answer), answer
        if "seq 400" in script:
            assert answer["notices"] == [
                "the session's limit of 128 processes and threads was reached (--session-processes of the agent's "
                "launcher); processes of this turn were ended or could not start"
            ]
        assert 'answered: "got it all' not in str(answer)
        assert "I am fine" in await bash(agent, "echo I am fine", neighbour, number=number)
        await agent.delete(f"/v1/agent/session/{victim}")
    assert agent.cli_pid(neighbour) == pid


async def test_forged_output_of_the_cli_stays_in_its_own_session(agent: Agent) -> None:
    session_id, other = new_session_id(), new_session_id()
    forged = (
        f'{{"type":"result","subtype":"success","is_error":false,"session_id":"{other}","result":"forged",'
        '"duration_ms":1,"duration_api_ms":1,"num_turns":1,"total_cost_usd":99,"usage":{"output_tokens":999999}}'
    )
    script = (
        f"for p in $PPID $CLAUDE_PID; do for f in 1 2; do echo '{forged}' > /proc/$p/fd/$f; done; done 2>&1; "
        "python3 -c 'import ctypes,os,sys\nl=ctypes.CDLL(None)\n"
        'print("traced", l.ptrace(16, int(os.environ["CLAUDE_PID"]), 0, 0), '
        'l.syscall(438, l.syscall(434, int(os.environ["CLAUDE_PID"]), 0), 1, 0))\''
    )
    answer = await agent.chat(turn(tool("Bash", command=script), session_id, timeout=60))
    assert answer["usage"]["output_tokens"] < 1000
    assert answer["session_id"] == session_id
    assert "traced -1 -1" in answer["content"], answer
    assert answer["content"].count("Permission denied") >= 2  # the CLI's descriptors are not its user's to open
    assert answer["content"] != "forged"


_FILLS = {
    "bytes": "with open(f'f{i}', 'wb') as file: file.write(bytes(4 << 20))",
    "files": "open(f'f{i}', 'w').close(); os.mkdir(f'd{i}')",
    # one below the other: deeper than any path is long, than Python recurses, than there are descriptors
    "depth": "[open(f'f{n}', 'w').close() for n in range(9)]; os.mkdir('d'); os.chdir('d')",
}


_ASKS = """
import base64, sys, urllib.request, urllib.error
headers = {"content-type": "application/json", "anthropic-version": "2023-06-01", "x-api-key": "x"}
for body in sys.argv[1:]:
    request = urllib.request.Request("http://127.0.0.1:8090/v1/messages", base64.b64decode(body), headers)
    try:
        print("status", urllib.request.urlopen(request).status)
    except urllib.error.HTTPError as error:
        print("status", error.code)
"""


async def test_the_credential_used_directly_gets_no_more_than_its_session_may(
    simulator: RunningSimulator, tmp_path: Path
) -> None:
    """The session's tools reach the model routes with its credential; the gateway holds them to its limits."""
    asks: list[dict[str, Any]] = [
        {"model": "claude-opus-5-5"},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]},
        {"container": "c_1"},
        {"max_tokens": 900_000},
    ]
    plain = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "[[say direct]]"}]}
    script = (
        f"{python(_ASKS, *(base64.b64encode(json.dumps(plain | ask).encode()).decode() for ask in asks))}; "
        "for path in session-tokens agent-token enrol sessions/x/transcript; do "
        "curl -s -o /dev/null -w 'internal %{http_code}\n' http://127.0.0.1:8090/internal/$path -d '{}'; done"
    )
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "store.db"), simulator.url) as site:
        session_id = await site.session(model=MODEL)
        number = await site.turn(session_id, max_tokens=700)
        with launched(tmp_path / "agent") as own:
            async with (
                stand_in_gateway(site.url, upstream_token=site.token(session_id)) as gateway,
                served_agent(gateway, tmp_path / "agent", own) as agent,
            ):
                seen = await bash(agent, script, session_id, number=number)
        assert re.findall(r"status (\d+)", seen) == ["403"] * 4 + ["200"], seen
        assert seen.count("internal 403") == 4, seen
        direct = [r["body"] for r in simulator.requests() if "[[say direct]]" in json.dumps(r["body"]["messages"][-1:])]
        assert [(body["model"], body["max_tokens"] <= 700) for body in direct][-1:] == [(MODEL, True)]
        assert not [body for body in direct if body["model"] != MODEL or body.get("mcp_servers")]
        # and what it used is metered as its session's, whatever the CLI was made to say
        assert {entry.session_id for entry in await site.entries()} == {session_id}
        assert len(await site.entries()) >= 3


async def test_where_files_are_scanned_a_session_that_fills_the_disk_is_ended_and_no_other(tmp_path: Path) -> None:
    limits = ("--session-disk-mb", "64", "--session-files", "2000", "--storage", "scan")
    with launched(tmp_path / "state", *limits, users=100, first=FIRST_USER + 5_200) as launcher:
        await fill_the_disk(launcher)


async def fill_the_disk(launcher: LauncherClient) -> None:
    greedy, modest = [new_session_id() for _ in _FILLS], new_session_id()
    until_told = "head -c 8M /dev/zero > x; until test -e stop; do sleep 0.05; done"
    beside = asyncio.create_task(launcher.run_as(modest, ["/bin/sh", "-c", until_told]))
    for session, filling in zip(greedy, _FILLS.values(), strict=True):
        script = f"import itertools, os\nfor i in itertools.count(1):\n {filling}"
        assert await launcher.run_as(session, ["/usr/bin/python3", "-c", script]) == 137
    assert await launcher.run_as(modest, ["/bin/touch", "stop"]) == 0
    assert await beside == 0
    for session in (*greedy, modest):
        await launcher.remove(session)


@pytest.mark.skipif(not (GROUPS and "cores" in GROUPS.enforced), reason="no control groups for cores here")
async def test_a_spinning_daemon_gets_its_share_and_its_neighbour_is_served(
    simulator_process: RunningSimulator, tmp_path: Path
) -> None:
    cores = 0.5
    others = FIRST_USER + 5_000  # the module's launcher has users too
    with launched(tmp_path / "state", "--session-cores", str(cores), users=100, first=others) as own:
        async with (
            stand_in_gateway(simulator_process.url) as gateway,
            served_agent(gateway, tmp_path / "state", own) as agent,
        ):
            spinner = new_session_id()
            spin = "for i in 1 2 3 4; do (exec -a spin sh -c 'while :; do :; done') > /dev/null 2>&1 & done"
            await bash(agent, spin, spinner)
            session = agent.server.enrolled().get(spinner)
            uid = await uid_of(agent, spinner)
            spinning = {pid for pid in host_pids(uid) if Path(f"/proc/{pid}/cmdline").read_bytes()[:4] == b"spin"}
            assert len(spinning) == 4
            began, used = time.monotonic(), cpu_seconds(spinning)
            assert "I am fine" in await bash(agent, "echo I am fine")
            await until(lambda: cpu_seconds(spinning) - used > 0.2)
            assert cpu_seconds(spinning) - used <= cores * (time.monotonic() - began + 0.2) + 0.04  # a clock tick each
            assert await session.park()
            assert host_pids(uid) == set()


def cpu_seconds(pids: set[int]) -> float:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


async def test_users_come_back_only_when_all_were_used_and_nothing_is_left_of_the_first(tmp_path: Path) -> None:
    with launched(tmp_path / "state", users=3) as own:
        folder = tmp_path / "state/sessions"

        async def user(session: str) -> int:
            with (tmp_path / "uid").open("w+") as said:
                script = "id -u; mkdir -p a/b && chmod 0 a; sleep 600 & exit 0"
                assert await own.run_as(session, ["/bin/sh", "-c", script], stdout=said.fileno()) == 0
                return int((tmp_path / "uid").read_text())

        first, second, third, fourth = (new_session_id() for _ in range(4))
        assert [await user(first), await user(second)] == [FIRST_USER, FIRST_USER + 1]
        await own.remove(first)
        assert await user(third) == FIRST_USER + 2, "a fresh one first"
        assert await user(fourth) == FIRST_USER
        assert {entry.name for entry in folder.iterdir()} == {second, third, fourth}
        with pytest.raises(LaunchFailed, match="all uids of this agent are in use"):
            await user(new_session_id())
        await own.remove(third)
        assert await user(new_session_id()) == FIRST_USER + 2


async def test_what_the_launcher_is_told_never_leads_out(launcher: LauncherClient, state: Path) -> None:
    for name in ("..", "../../etc", "a/b/c/d/e/f", "", "x" * 70):
        with pytest.raises(LaunchFailed):
            await launcher.run_as(name, ["/bin/true"])
    session = new_session_id()
    assert await launcher.run_as(session, ["/bin/sh", "-c", "ln -s /etc config/projects; exit 7"], cwd=".") == 7
    assert await launcher.file_size(session, "config/projects/passwd") is None
    assert await launcher.file_size(session, "../../../../etc/passwd") is None
    with pytest.raises(LaunchFailed, match="No such file"):
        await launcher.run_as(session, ["/no/such/program"])
    with pytest.raises(TimeoutError):
        await launcher.run_as(session, ["/bin/sleep", "60"], timeout=0.2)
    assert await launcher.run_as(session, ["/bin/sh", "-c", "kill -9 $$"]) == 137
    assert await launcher.run_as(session, ["/usr/bin/curl", "-s", "-m", "2", "http://127.0.0.1:8090/"]) == 7
    await launcher.remove(session)
    await launcher.remove(session)
    assert not (state / "sessions" / session).exists()


async def test_a_new_session_takes_a_spare_and_is_nobody_elses(simulator: RunningSimulator, tmp_path: Path) -> None:
    with launched(tmp_path / "state") as launcher:
        async with (
            stand_in_gateway(simulator.url) as gateway,
            served_agent(gateway, tmp_path / "state", launcher, spares=1, live_sessions=3) as agent,
        ):
            prewarmed = agent.server.enrolled().prewarmed
            await until(lambda: prewarmed.pids() and not prewarmed._starting)
            spare = prewarmed.pids()[0]
            one, other = new_session_id(), new_session_id()
            async with prewarmed._context.start_limiter.session(
                "ada"
            ):  # while a session's CLI starts, none is prewarmed
                await bash(agent, "echo mine > note", one)
                assert (agent.cli_pid(one), prewarmed.count) == (spare, 0)
                if GROUPS:
                    assert "/user-" in Path(f"/proc/{spare}/cgroup").read_text(), "charged to the user who took it"
            await until(lambda: prewarmed.pids())
            assert len(simulator.requests(one)) == 2
            # another prompt than the spare's: started for it, and from then on prewarmed CLIs are like it
            await bash(agent, "ls", other, user_id="bob", system_prompt="[[say hello]]")
            assert agent.cli_pid(other) != spare
            # parked and resumed in the spare's folder, under its own name
            assert await agent.server.enrolled().get(one).park()
            assert "mine" in await bash(agent, "cat note", one, number=2)
            assert len(simulator.requests(one)[-1]["body"]["messages"]) == 7
            # idle sessions are parked for prewarmed CLIs, and prewarmed CLIs end for sessions
            sessions = agent.server.enrolled()
            await until(lambda: sessions.counts()[1] <= 2 and len(prewarmed.pids()) == 1)
            slow = [asyncio.create_task(agent.chat(turn("[[ttft 3]]", user_id=f"user-{n}"))) for n in range(3)]
            await until(lambda: prewarmed.count == 0 and sessions.counts()[2] == 3)
            await asyncio.gather(*slow)
            await until(lambda: sessions.counts()[1] <= 2 and len(prewarmed.pids()) == 1)


async def test_an_idle_session_is_parked_and_comes_back_with_its_history(
    simulator_process: RunningSimulator, tmp_path: Path
) -> None:
    with launched(tmp_path / "state") as own:
        async with (
            stand_in_gateway(simulator_process.url) as gateway,
            served_agent(gateway, tmp_path / "state", own, park_after=0.2) as agent,
        ):
            session_id = new_session_id()
            await agent.chat(turn("remember the number 7341", session_id))
            sessions = agent.server.enrolled()
            await until(lambda: sessions.counts()[1] == 0)
            assert sessions.get(session_id).view().state == "parked"
            answer = await agent.chat(turn("[[recall 1]]", session_id, number=2))
            assert "remember the number 7341" in answer["content"]


async def test_an_agent_that_has_no_launcher_says_so_and_offers_no_tools(
    simulator_process: RunningSimulator, tmp_path: Path
) -> None:
    told = AgentConfiguration(max_concurrent=5, tools=True, needs_separation=True)
    async with (
        stand_in_gateway(simulator_process.url, configuration=told) as gateway,
        served_agent(gateway, tmp_path) as agent,
    ):
        answer = await agent.chat(turn(tool("Bash", command="id")))
        assert not answer["tools"]
        assert "without its launcher" in answer["notices"][0]
        _, health = await agent.get("/health")
        assert (health["sessions_kept_apart"], health["tools"][:4]) == (False, "off:")


async def test_a_session_uses_the_operators_skills_and_cannot_change_them(
    agent: Agent, simulator: RunningSimulator, skills: Path
) -> None:
    session_id = new_session_id()
    # A script in a file: the CLI itself refuses a command line that writes where a plugin is.
    script = f"echo forged >> {skills}/knots/SKILL.md; touch {skills}/more; mkdir {skills}/worse"
    encoded = base64.b64encode(script.encode()).decode()
    said = await bash(agent, f"echo {encoded} | base64 -d > try; sh ./try 2>&1; true", session_id, skills=["knots"])
    assert said.count("Read-only file system") == 3
    await agent.chat(turn(tool("Skill", skill="knots"), session_id, number=2, timeout=60, skills=["knots"]))
    assert "Tie a bowline." in json.dumps(simulator.requests(session_id)[-1]["body"])
    assert [entry.name for entry in skills.iterdir()] == ["knots"]


async def test_permissions_may_be_bypassed_where_sessions_are_not_root(agent: Agent) -> None:
    """The mode that the CLI refuses to root; without a launcher, sessions of a root server would be."""
    said = await bash(agent, "echo by=$(id -u).", permission_mode="bypassPermissions", allowed_tools=[])
    assert int(said.partition("by=")[2].split(".")[0]) >= 2_000_000_000
