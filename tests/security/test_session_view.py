"""A session's view of its host and of its Claude CLI: tools explore the view and attack the CLI's process.

The real launcher and the real CLI; one agent serves the module.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hypercore_agents.agent.launcher.client import LauncherClient
from hypercore_agents.agent.launcher.protocol import CLI
from hypercore_agents.api.ids import new_session_id
from support.agent_server import FIRST_USER, Agent, tool, turn
from support.isolation_marks import needs_isolation
from support.launched_agent import LauncherOptions, launched_agent, python_command

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.root,
    needs_isolation,
]
CANARY = "the-platforms-key-7341"


agent = launched_agent


@pytest.fixture(scope="module")
def launcher_options() -> LauncherOptions:
    return LauncherOptions(("--session-memory-mb", "700"), FIRST_USER + 7_000, 500)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shell(launcher: LauncherClient, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """Return a function that runs a script as one session, without a CLI, and returns its output."""
    session, output = new_session_id(), tmp_path_factory.mktemp("output") / "out"

    async def run(script: str) -> str:
        with output.open("w+b") as out:
            await launcher.run_as(session, ["/bin/sh", "-c", f"exec 2>&1; {script}"], stdout=out.fileno())
        return output.read_text()

    yield run


async def test_programs_find_a_user_with_name_home_and_address(shell: Any) -> None:
    look = (
        "import getpass, os, pwd, grp; user = pwd.getpwuid(os.getuid()); "
        "print(getpass.getuser(), user.pw_dir, os.path.expanduser('~session'), grp.getgrgid(os.getgid()).gr_name)"
    )
    said = await shell(f'whoami; id -un; id -gn; python3 -c "{look}"; echo ~session; hostname')
    assert said.split() == ["session"] * 4 + [*("/session/home",) * 2, "session", "/session/home", "session"], said
    said = await shell(
        "git init -q . && echo a > a && git add a && git commit -qm x && git log --format=%ae; rm -r .git"
    )
    assert said == "session@localhost\n"
    if Path("/usr/bin/ssh").exists():  # ssh finds its user and so gets as far as the network
        assert "Connection refused" in await shell("ssh -o BatchMode=yes -p 9 127.0.0.1")


async def test_a_session_sees_only_named_parts_of_etc_and_none_of_opt(shell: Any) -> None:
    in_etc, in_opt = Path(f"/etc/hypercore-test-{os.getpid()}"), Path(f"/opt/hypercore-test-{os.getpid()}")
    in_opt.mkdir()
    try:
        for path in (in_etc, in_opt / ".env"):
            path.write_text(f"ANTHROPIC_API_KEY={CANARY}\n")
            path.chmod(0o644)
        said = await shell(
            f"cat {in_etc} {in_opt}/.env; ls /opt {in_opt}; grep -rs {CANARY} /etc /opt; cat /etc/shadow"
        )
        assert said.count("No such file or directory") == 4, said
        assert CANARY not in said
    finally:
        in_etc.unlink()
        (in_opt / ".env").unlink()
        in_opt.rmdir()
    works = (
        "import ssl, time, mimetypes, socket; print(len(ssl.create_default_context().get_ca_certs()) > 50, "
        "mimetypes.guess_type('a.json')[0], socket.getservbyname('https'), socket.gethostbyname('localhost'))"
    )
    said = await shell(f'python3 -c "{works}"; readlink -e /etc/localtime > /dev/null && date > /dev/null && echo ok')
    assert said == "True application/json 443 127.0.0.1\nok\n"


async def test_proc_hides_the_hosts_command_line_load_and_memory(shell: Any) -> None:
    names = "cmdline loadavg meminfo stat pressure/cpu 1/cmdline self/cgroup"
    said = await shell(f"cd /proc && cat {names}")
    assert Path("/proc/cmdline").read_text().strip() not in said
    assert "0.00 0.00 0.00 1/1 1" in said
    assert f"MemTotal: {700 * 1024:>17} kB" in said, said
    assert "hypercore" not in said, "neither the launcher's arguments nor names of control groups"
    if Path("/proc/pressure/cpu").exists():
        assert "pressure/cpu: No such file" in said
    busy = [line for line in said.splitlines() if line.startswith("cpu")]
    assert busy
    assert all(set(line.split()[1:]) == {"0"} for line in busy)
    said = await shell("ps -eo user,comm | head -2 && uptime > /dev/null && free > /dev/null && nproc")
    assert said.splitlines()[-1] == str(len(os.sched_getaffinity(0)))


_ATTACK = r"""
import glob, os
cli = int(os.environ["CLAUDE_PID"])
def attempt(what, call):
    try:
        print(what, "REACHED", call())
    except OSError as error:
        print(what, error.strerror)
for pid in {cli, *(int(p) for p in os.listdir("/proc") if p.isdigit() and os.readlink_or(p) == "claude")}:
    attempt("mem", lambda: open(f"/proc/{pid}/mem", "r+b").close())
    for name in ("environ", "maps", "smaps", "auxv", "io", "stack"):
        attempt(name, lambda: open(f"/proc/{pid}/{name}", "rb").read(9))
    for name in ("fd", "fdinfo", "map_files"):
        attempt(name, lambda: os.listdir(f"/proc/{pid}/{name}"))
    for name in ("exe", "cwd", "root"):
        attempt(name, lambda: os.readlink(f"/proc/{pid}/{name}"))
    attempt("read exe", lambda: open(f"/proc/{pid}/exe", "rb").read(9))
attempt("read file", lambda: open("PROGRAM", "rb").read(9))
attempt("chmod", lambda: os.chmod("PROGRAM", 0o755))
attempt("replace", lambda: os.rename("PROGRAM", "PROGRAM.old"))
attempt("write", lambda: open("PROGRAM", "ab").close())
"""


async def test_a_tool_cannot_access_the_process_or_program_of_its_cli(agent: Agent) -> None:
    """Memory, environment, maps and descriptors of the running CLI, and the program itself."""
    attack = _ATTACK.replace("PROGRAM", CLI).replace(
        'os.readlink_or(p) == "claude"', 'open(f"/proc/{p}/comm").read().strip() == "claude"'
    )
    session = new_session_id()
    answer = await agent.chat(turn(tool("Bash", command=python_command(attack)), session, timeout=60))
    said = answer["content"]
    assert "REACHED" not in said, said
    assert said.count("Permission denied") + said.count("Read-only file") + said.count("not permitted") >= 17, said
    for what in ("mem", "environ", "maps", "fd", "exe", "read exe"):
        assert f"{what} Permission denied" in said, said
    # The reason: root owns the process's files in /proc, and its user cannot read the program.
    pid = agent.cli_pid(session)
    assert os.stat(f"/proc/{pid}/mem").st_uid == 0
    running = os.stat(f"/proc/{pid}/exe")
    assert (running.st_uid, running.st_mode & 0o7777) == (0, 0o711)


async def test_the_cli_can_search_files_and_start_itself_again(agent: Agent) -> None:
    """Grep and Glob run a program that is part of the CLI's file."""
    session = new_session_id()
    await agent.chat(turn(tool("Bash", command="echo needle-7341 > hay.txt"), session, timeout=60))
    said = await agent.chat(
        turn(tool("Grep", pattern="needle-[0-9]+", output_mode="content"), session, number=2, timeout=60)
    )
    assert "hay.txt:" in said["content"]
    said = await agent.chat(turn(tool("Glob", pattern="*.txt"), session, number=3, timeout=60))
    assert "hay.txt" in said["content"]
    said = await agent.chat(turn(tool("Bash", command=f"{CLI} --version"), session, number=4, timeout=60))
    assert "Claude Code" in said["content"]
