"""The process backend when processes or managers die, disks are full, and agents are hostile."""

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hypercore_agents.compute.base import Sandbox, SandboxError, SandboxState
from hypercore_agents.compute.host.identity import is_alive, process_status, reap
from hypercore_agents.compute.process import ProcessBackend, teardown
from hypercore_agents.compute.process.teardown import destroy
from hypercore_agents.compute.testing.conformance import eventually
from support.process_backend import ProcessSubject, ask, no_limits, no_own_users
from support.sandboxes import exited

Make = Callable[..., Awaitable[ProcessSubject]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Create subjects that are checked for leftovers and closed at the end."""
    made: list[tuple[ProcessSubject, frozenset[str]]] = []

    async def new(**options: Any) -> ProcessSubject:
        subject = ProcessSubject(**options)
        made.append((subject, subject.residue()))
        return subject

    yield new
    for subject, before in made:
        for sandbox in await subject.backend.list():
            await subject.backend.stop(sandbox.agent_id, grace=0)
        left = subject.residue() - before
        await subject.close()
        assert left == frozenset()


@pytest.fixture(params=[pytest.param("own users", marks=pytest.mark.root), "shared user"])
async def subject(request: pytest.FixtureRequest, make: Make) -> ProcessSubject:
    if request.param == "own users" and no_own_users():
        pytest.skip(str(no_own_users()))
    return await make(own_users=request.param == "own users")


def runs(pid: int) -> bool:
    status = process_status(pid)
    return status is not None and not status.ended


async def gone(pid: int) -> None:
    async def ended() -> bool:
        return not runs(pid)

    await eventually(ended)


async def test_stop_finds_the_rest_after_a_shim_was_killed(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    daemon, agent = await ask(sandbox, "daemon"), subject.agent(sandbox)
    os.kill(subject.shim(sandbox), signal.SIGKILL)
    await gone(agent)
    seen = await exited(subject.backend, sandbox)
    assert (seen.exit_status, seen.exit_reason) == (None, "its shim was killed, and the agent with it")
    assert runs(daemon)
    await subject.backend.stop(sandbox.agent_id)
    assert not runs(daemon)


@pytest.mark.parametrize("hidden", ["in the middle of an exec", "behind its child"])
async def test_a_second_search_finds_a_missed_process(make: Make, hidden: str) -> None:
    subject = await make()
    sandbox = await subject.backend.start(subject.request())
    daemon = await ask(sandbox, "daemon")
    os.kill(subject.shim(sandbox), signal.SIGKILL)
    await gone(subject.agent(sandbox))
    look, looks = teardown._environments, 0

    def environments(oldest: int) -> Iterator[tuple[int, bytes]]:
        nonlocal looks
        looks += 1
        for pid, environment in look(oldest):
            if pid != daemon or looks > 1:
                yield pid, environment
            elif hidden == "in the middle of an exec":
                yield pid, b""

    with mock.patch.object(teardown, "_environments", environments):
        await subject.backend.stop(sandbox.agent_id)
    assert not runs(daemon)


async def test_killing_the_agent_ends_all_its_descendants(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    daemon = await ask(sandbox, "daemon")
    os.kill(subject.agent(sandbox), signal.SIGKILL)
    seen = await exited(subject.backend, sandbox)
    assert (seen.exit_status, seen.exit_reason) == (-signal.SIGKILL, "killed by SIGKILL")
    await gone(daemon)
    await gone(subject.shim(sandbox))


async def test_a_daemon_is_gone_after_a_stop(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    daemons = [await ask(sandbox, "daemon") for _ in range(3)]
    assert all(runs(daemon) for daemon in daemons)
    await subject.backend.stop(sandbox.agent_id)
    assert not any(runs(daemon) for daemon in daemons)


async def test_stop_waits_for_the_grace_period_and_not_longer(make: Make) -> None:
    slow, deaf = await make(mode="slow"), await make(mode="deaf")
    ending, hanging = await slow.backend.start(slow.request()), await deaf.backend.start(deaf.request())
    # Both answer, so both have installed their handlers of SIGTERM.
    await asyncio.gather(ask(ending, "look"), ask(hanging, "look"))
    with mock.patch("hypercore_agents.compute.process.launch.destroy", wraps=destroy) as destroying:
        await slow.backend.stop(ending.agent_id, grace=20)
        assert [not is_alive(call.args[1].shim) for call in destroying.call_args_list] == [True]
        destroying.side_effect = lambda directory, *_: statuses.append(directory.read_exit())
        statuses: list[Any] = []
        await deaf.backend.stop(hanging.agent_id, grace=0.05)
        assert statuses == [None]
    assert runs(deaf.agent(hanging))
    await deaf.backend.stop(hanging.agent_id, grace=0.05)


async def test_a_stopped_shim_is_killed(subject: ProcessSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypercore_agents.compute.host.teardown._SHIM_SECONDS", 0.1)
    sandbox = await subject.backend.start(subject.request())
    daemon = await ask(sandbox, "daemon")
    os.kill(subject.shim(sandbox), signal.SIGSTOP)
    await subject.backend.stop(sandbox.agent_id, grace=0.05)
    assert not runs(daemon)


async def test_the_next_stop_completes_an_incomplete_one(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    failing = mock.patch(
        "hypercore_agents.compute.host.teardown.remove_tree", side_effect=OSError(5, "Input/output error")
    )
    with failing, pytest.raises(SandboxError, match="Input/output error"):
        await subject.backend.stop(sandbox.agent_id, grace=0)
    assert [seen.agent_id for seen in await subject.backend.list()] == [sandbox.agent_id]
    await subject.backend.stop(sandbox.agent_id)
    assert await subject.backend.list() == []


async def test_an_agent_with_unkillable_processes_is_not_reported_stopped(
    subject: ProcessSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await subject.backend.start(subject.request())
    daemon = await ask(sandbox, "daemon")
    os.kill(subject.shim(sandbox), signal.SIGKILL)
    await gone(subject.agent(sandbox))
    monkeypatch.setattr("hypercore_agents.compute.host.teardown._KILL_SECONDS", 0.1)
    with (
        mock.patch("hypercore_agents.compute.host.teardown.send_signal"),
        pytest.raises(SandboxError, match=rf"survive SIGKILL: \[{daemon}\]"),
    ):
        await subject.backend.stop(sandbox.agent_id)
    assert [seen.agent_id for seen in await subject.backend.list()] == [sandbox.agent_id]


MANAGER = """
import asyncio, json, os, signal, sys
from pathlib import Path
from unittest import mock
from hypercore_agents.compute.base import SandboxRequest
from hypercore_agents.compute.process import ProcessBackend, launch

state, agent_id, options, dies_in = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

async def main():
    options["agent_uids"] = options["agent_uids"] and range(*options["agent_uids"])
    options["uid_claims"] = Path(options["uid_claims"])
    backend = ProcessBackend(Path(state), **options)
    await backend.start(SandboxRequest(agent_id, 1, 512, "http://127.0.0.1:9", "s" * 40))
    die()

with mock.patch.object(launch._Start, dies_in, die) if dies_in else mock.patch("builtins.print"):
    asyncio.run(main())
"""


async def dead_manager(subject: ProcessSubject, agent_id: str, dies_in: str) -> None:
    await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", MANAGER, str(subject.state), agent_id, subject.options_as_json(), dies_in],
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("step", ["_spawn_shim", "_receive_agent", "_receive"])
async def test_a_killed_manager_leaves_no_process(subject: ProcessSubject, step: str) -> None:
    request = subject.request()
    await dead_manager(subject, request.agent_id, step)

    async def no_process() -> bool:
        return not any(name.startswith("process") for name in subject.residue())

    await eventually(no_process)
    (seen,) = await subject.backend.list()
    assert (seen.agent_id, seen.state, seen.exit_status) == (request.agent_id, SandboxState.EXITED, None)
    assert seen.exit_reason == "its start was interrupted"
    # The same request can be repeated, as if the first start had never happened.
    sandbox = await subject.backend.start(request)
    assert sandbox.state is SandboxState.RUNNING
    assert (await ask(sandbox, "look"))["secret"] == request.enrolment_secret


async def test_agents_outlive_their_manager(subject: ProcessSubject) -> None:
    request = subject.request()
    await dead_manager(subject, request.agent_id, "")
    (sandbox,) = await subject.backend.list()
    assert sandbox.state is SandboxState.RUNNING
    await subject.print(sandbox, "alive")

    async def logged() -> bool:
        return await subject.backend.logs(sandbox.agent_id) == b"alive"

    await eventually(logged)
    await subject.end(sandbox, 9)
    assert (await exited(subject.backend, sandbox)).exit_status == 9


async def test_a_process_that_reuses_the_pid_is_not_killed(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    record = subject.record(sandbox)
    os.kill(subject.shim(sandbox), signal.SIGKILL)
    await gone(subject.agent(sandbox))
    assert record.shim is not None
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        # The shim is certainly older than the stranger; the agent may have started in the same clock tick.
        older = replace(record.shim, pid=stranger.pid)
        subject.directory(sandbox).write(replace(record, shim=older, agent=older))
        assert (await exited(subject.backend, sandbox)).exit_status is None
        await subject.backend.stop(sandbox.agent_id)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    reap(record.shim)


async def test_sandboxes_of_an_earlier_boot_are_exited(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    record = subject.record(sandbox)
    assert record.shim is not None
    assert record.agent is not None
    os.kill(subject.agent(sandbox), signal.SIGKILL)
    await gone(record.shim.pid)
    shim, agent = replace(record.shim, boot="earlier"), replace(record.agent, boot="earlier")
    subject.directory(sandbox).write(replace(record, shim=shim, agent=agent))
    subject.directory(sandbox).exit.write_bytes(b" " * 256)
    seen = await exited(subject.backend, sandbox)
    assert seen.exit_reason == "the host was restarted"
    await subject.backend.stop(sandbox.agent_id)
    assert await subject.backend.list() == []
    reap(record.shim)


async def test_a_copied_state_folder_does_not_touch_the_originals_agents(make: Make) -> None:
    subject = await make(own_users=no_own_users() is None, limits=no_limits() is None)
    sandbox = await subject.backend.start(subject.request())
    original, subject.state = subject.state, subject.place / "copy"
    shutil.copytree(original, subject.state, symlinks=True)
    copy = subject.successor()
    try:
        (seen,) = await copy.list()
        assert (seen.agent_id, seen.state) == (sandbox.agent_id, SandboxState.EXITED)
        assert "belongs to" in str(seen.exit_reason)
        assert (await copy.usage()).memory_used_mb == 0
        await copy.stop(sandbox.agent_id, grace=5)
        assert await copy.list() == []
    finally:
        await copy.close()
        shutil.rmtree(subject.state)
        subject.state = original
    assert runs(subject.agent(sandbox))
    assert runs(subject.shim(sandbox))
    await subject.print(sandbox, "alive")
    assert await subject.backend.list() == [sandbox]


async def test_a_damaged_record_hides_no_process(make: Make) -> None:
    subject = await make(own_users=no_own_users() is None, limits=no_limits() is None)
    sandbox = await subject.backend.start(subject.request())
    record = subject.record(sandbox)
    shim, agent = subject.shim(sandbox), subject.agent(sandbox)
    daemon = await ask(sandbox, "daemon")
    subject.directory(sandbox).record.write_bytes(b'{"agent_id": ')
    (seen,) = await subject.backend.list()
    assert (seen.agent_id, seen.state) == (sandbox.agent_id, SandboxState.EXITED)
    await subject.backend.stop(sandbox.agent_id)
    assert not any(runs(pid) for pid in (shim, agent, daemon))
    reap(record.shim)


async def test_a_tree_deeper_than_python_recurses_is_removed(subject: ProcessSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    await ask(sandbox, "deep", levels=3 * sys.getrecursionlimit())
    await subject.backend.stop(sandbox.agent_id)
    assert not subject.directory(sandbox).path.exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=256k") != 0:
        pytest.skip(f"needs to mount a file system: {os.strerror(ctypes.get_errno())}")
    yield disk
    assert libc.umount2(os.fsencode(disk), 0) == 0, os.strerror(ctypes.get_errno())


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:
                return ballast


async def test_a_full_disk_fails_a_start_cleanly(make: Make, tiny_disk: Path) -> None:
    subject = await make(limits=no_limits() is None)
    backend = ProcessBackend(tiny_disk / "state", **subject.options)
    await backend.stop((await backend.start(subject.request())).agent_id, grace=0)
    ballast = fill(tiny_disk)
    with pytest.raises(SandboxError, match="No space left on device"):
        await backend.start(subject.request())
    assert await backend.list() == []
    assert list((tiny_disk / "state" / "sandboxes").iterdir()) == []
    ballast.unlink()
    sandbox = await backend.start(subject.request())
    await backend.stop(sandbox.agent_id, grace=0)
    await backend.close()


async def test_an_agent_runs_and_exits_normally_on_a_full_disk(make: Make, tiny_disk: Path) -> None:
    subject = await make(log_bytes=1 << 20)
    backend = ProcessBackend(tiny_disk / "state", **subject.options)
    sandbox = await backend.start(subject.request())
    fill(tiny_disk)
    await subject.print(sandbox, "y" * 1000, times=1000)
    assert (await ask(sandbox, "look"))["pid"] > 0
    await subject.end(sandbox, 5)

    async def ended() -> Sandbox | None:
        seen = await backend.inspect(sandbox.agent_id)
        return seen if seen and seen.state is SandboxState.EXITED else None

    seen = await eventually(ended)
    assert seen is not None
    assert seen.exit_status == 5
    await backend.stop(sandbox.agent_id)
    assert await backend.list() == []
    await backend.close()


limited = pytest.mark.skipif(no_limits() is not None, reason=str(no_limits()))


@pytest.mark.root
@limited
async def test_a_child_is_killed_at_the_memory_limit_and_the_agent_survives(make: Make) -> None:
    subject = await make(limits=True)
    sandbox = await subject.backend.start(replace(subject.request(), memory_mb=64))
    assert await ask(sandbox, "eat in child", megabytes=200) == -signal.SIGKILL
    assert (await ask(sandbox, "look"))["pid"] == subject.agent(sandbox)


@pytest.mark.root
@limited
async def test_an_agent_killed_at_its_memory_limit_has_the_reason(make: Make) -> None:
    subject = await make(limits=True)
    sandbox = await subject.backend.start(replace(subject.request(), memory_mb=64))
    with pytest.raises((ValueError, OSError)):
        await ask(sandbox, "eat", megabytes=200)
    seen = await exited(subject.backend, sandbox)
    assert seen.exit_status == -signal.SIGKILL
    assert seen.exit_reason == "killed by SIGKILL; the kernel killed 1 of its processes at the limit of 64 MB"


@pytest.mark.root
@limited
async def test_a_fork_bomb_is_bounded_and_can_be_stopped(make: Make) -> None:
    subject = await make(limits=True, max_processes=40)
    sandbox = await subject.backend.start(subject.request())
    await ask(sandbox, "bomb")
    group = Path(next(path for path in subject.record(sandbox).cgroups if "pids" in Path(path).parts))

    async def full() -> bool:
        return int((group / "pids.current").read_text()) >= 40

    await eventually(full)
    await subject.backend.stop(sandbox.agent_id, grace=0)


@pytest.mark.root
@limited
async def test_a_fork_bomb_whose_shim_is_dead_can_be_stopped(make: Make) -> None:
    subject = await make(limits=True, max_processes=40)
    sandbox = await subject.backend.start(subject.request())
    await ask(sandbox, "bomb")
    os.kill(subject.shim(sandbox), signal.SIGKILL)
    await gone(subject.agent(sandbox))
    await subject.backend.stop(sandbox.agent_id, grace=0)


@pytest.mark.root
@pytest.mark.skipif(no_own_users() is not None, reason=str(no_own_users()))
async def test_a_separate_user_limits_processes_without_control_groups(make: Make) -> None:
    subject = await make(own_users=True, max_processes=20)
    assert subject.backend.capabilities.enforced_limits == {"pids"}
    sandbox = await subject.backend.start(subject.request())
    assert await ask(sandbox, "forks", wanted=100) < 20
