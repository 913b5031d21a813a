"""The environment, descriptors and privileges of an agent of the process backend, and the size of its shim."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from hypercore_agents.compute.host.identity import boot_id, identify
from hypercore_agents.compute.testing.conformance import SECRET, eventually
from support.descriptors import descriptors
from support.folders_in_use import content_of, files_below
from support.process_backend import ProcessSubject, ask, no_limits, no_own_users

alone = pytest.mark.skipif(no_own_users() is not None, reason=str(no_own_users()))


@pytest.fixture
async def subject() -> AsyncIterator[ProcessSubject]:
    subject = ProcessSubject()
    yield subject
    await subject.close()


@pytest.fixture
async def separate() -> AsyncIterator[ProcessSubject]:
    subject = ProcessSubject(own_users=True, limits=no_limits() is None)
    yield subject
    await subject.close()


async def test_an_agents_environment_has_only_allowed_variables(
    subject: ProcessSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "canary")
    monkeypatch.setenv("PYTHONPATH", "/canary")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.delenv("LC_ALL", raising=False)
    request = replace(subject.request(), environment={"LOG_LEVEL": "debug", "TZ": "Europe/Zurich"})
    sandbox = await subject.backend.start(request)
    directory = subject.directory(sandbox)
    seen = (await ask(sandbox, "look"))["environment"]
    # Python itself adds this one in the C locale.
    seen.pop("LC_CTYPE", None)
    assert seen == {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "TZ": "Europe/Zurich",
        "LOG_LEVEL": "debug",
        "AGENT_ID": sandbox.agent_id,
        "AGENT_STATE_DIR": str(directory.work),
        "GATEWAY_URL": request.gateway_url,
        "AGENT_LISTEN_FD": "3",
        "ENROLMENT_FD": "4",
        "HOME": str(directory.work),
        "TMPDIR": str(directory.temporary),
    }


async def test_an_agent_inherits_only_its_own_descriptors(subject: ProcessSubject) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    os.dup2(writing, 200, inheritable=True)
    try:
        sandbox = await subject.backend.start(subject.request())
        pid = (await ask(sandbox, "look"))["pid"]
        # Neither the agent nor its shim has the end of the pipe.
        for process in (pid, subject.shim(sandbox)):
            held = {target for _, target in descriptors(process)}
            assert os.readlink(f"/proc/self/fd/{writing}") not in held
        assert set((await ask(sandbox, "look"))["descriptors"]) <= set(range(7))
    finally:
        for descriptor in (reading, writing, 200):
            os.close(descriptor)


async def test_the_enrolment_secret_is_only_in_the_pipe(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    assert (await ask(sandbox, "look"))["secret"] == SECRET
    for process in (subject.shim(sandbox), subject.agent(sandbox)):
        for file in ("environ", "cmdline"):
            assert SECRET.encode() not in Path(f"/proc/{process}/{file}").read_bytes()
    files = list(files_below(subject.place))
    assert subject.directory(sandbox).record in files
    assert not any(SECRET.encode() in content_of(path) for path in files)


async def test_a_record_identifies_processes_across_boots(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    record = subject.record(sandbox)
    assert record.agent is not None
    assert record.agent == identify((await ask(sandbox, "look"))["pid"])
    assert record.agent.boot == boot_id()
    directory = subject.directory(sandbox)
    assert {path.stat().st_mode & 0o777 for path in (directory.path, directory.work, directory.temporary)} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in (directory.record, directory.log, directory.exit)} == {0o600}


async def test_connections_wait_for_the_agent(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    # At once, long before the agent's interpreter has started.
    answers = await asyncio.gather(*(ask(sandbox, "look") for _ in range(20)))
    assert {answer["pid"] for answer in answers} == {subject.agent(sandbox)}


async def test_an_agent_can_close_its_output_and_continue(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    await ask(sandbox, "close output")
    assert (await ask(sandbox, "look"))["pid"] == subject.agent(sandbox)
    await subject.end(sandbox, 6)

    async def ended() -> bool:
        seen = await subject.backend.inspect(sandbox.agent_id)
        return seen is not None and seen.exit_status == 6

    await eventually(ended)


async def test_a_dead_agents_port_refuses(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    await ask(sandbox, "look")
    os.kill(subject.agent(sandbox), signal.SIGKILL)

    async def refused() -> bool:
        try:
            await ask(sandbox, "look")
        except ConnectionRefusedError:
            return True
        except (OSError, ValueError):
            # The agent died while it answered.
            return False
        return False

    await eventually(refused)


@pytest.mark.root
@alone
async def test_an_agent_with_its_own_user_has_no_privileges(separate: ProcessSubject) -> None:
    first, second = [await separate.backend.start(separate.request()) for _ in range(2)]
    seen = [(await ask(sandbox, "look"))["status"] for sandbox in (first, second)]
    users = [status["Uid"].split("\t") for status in seen]
    assert users[0] != users[1]
    for status, user in zip(seen, users, strict=True):
        assert set(user) == {user[0]}
        assert int(user[0]) in separate.users
        assert status["Gid"].split("\t") == user
        assert status["Groups"].strip() == ""
        assert status["NoNewPrivs"] == "1"
        for held in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[held], 16) == 0


@pytest.mark.root
@alone
async def test_an_agent_cannot_reach_records_or_other_agents(separate: ProcessSubject) -> None:
    first, second = [await separate.backend.start(separate.request()) for _ in range(2)]
    own, other = separate.directory(first), separate.directory(second)
    await ask(first, "write", path=str(own.work / "file"), text="mine")
    await ask(second, "write", path=str(other.work / "file"), text="yours")
    assert await ask(first, "read", path=str(own.work / "file")) == "mine"
    out_of_reach = [other.work / "file", own.record, own.log, own.exit, separate.state / "locks"]
    for path in out_of_reach:
        with pytest.raises(RuntimeError, match="PermissionError"):
            await ask(first, "read", path=str(path))
    with pytest.raises(RuntimeError, match="PermissionError"):
        await ask(first, "write", path=str(own.path / "file"), text="x")
    for pid in (separate.shim(first), separate.agent(second), os.getpid()):
        with pytest.raises(RuntimeError, match="PermissionError"):
            await ask(first, "kill", pid=pid, signal=signal.SIGTERM.value)


@pytest.mark.root
@alone
async def test_an_agent_is_in_its_groups(separate: ProcessSubject) -> None:
    if no_limits():
        pytest.skip(str(no_limits()))
    sandbox = await separate.backend.start(separate.request())
    daemon = await ask(sandbox, "daemon")
    groups = separate.record(sandbox).cgroups
    assert groups
    for group in groups:
        assert (Path(group) / "cgroup.procs").read_text().split() == [str(separate.agent(sandbox)), str(daemon)]


async def test_a_shim_is_small(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    await ask(sandbox, "look")
    rollup = Path(f"/proc/{subject.shim(sandbox)}/smaps_rollup").read_text()
    private = {line.split()[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    assert private["Anonymous:"] < 8 * 1024, "KiB of memory that is not shared with other shims"


def test_a_shim_has_few_imports() -> None:
    program = (
        "import sys; sys.path += sys.argv[1:]; import shim; "
        "print(*sorted(name for name in sys.modules if name.partition('.')[0] in ('typing', 'asyncio', 'logging', "
        "'pathlib', 'subprocess', 'socket', 'hypercore_agents', 'pydantic')))"
    )
    from hypercore_agents.compute.host.spawning import PACKAGE_FOLDER
    from hypercore_agents.compute.process import shim

    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(Path(shim.__file__).parent), PACKAGE_FOLDER],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = "hypercore_agents"
    assert answer.stdout.split() == [ours, f"{ours}.compute", f"{ours}.compute.host", f"{ours}.compute.host.shims"]
