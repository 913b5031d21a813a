"""The microvm backend when its parts die, hang or are killed at any moment, with real VMs."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.compute.base import InsufficientResources, SandboxError, SandboxState
from hypercore_agents.compute.host import capacity
from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.microvm.backend import MicrovmBackend
from hypercore_agents.compute.microvm.image import Image
from hypercore_agents.compute.testing.conformance import eventually
from support.descriptors import descriptor_count
from support.microvm_backend import LAUNCH, MicrovmSubject, Place, ask
from support.microvm_guest import tiny_guest
from support.sandboxes import exited

CYCLES = int(os.environ.get("MICROVM_CYCLES", "3"))
"""Number of spawns and deletions in the test that counts leaks; use 50 for a thorough run."""


@pytest.fixture
async def subject(microvm_place: Place) -> AsyncIterator[MicrovmSubject]:
    subject = MicrovmSubject(microvm_place)
    await subject.prepare()
    before = subject.residue()
    yield subject
    for sandbox in await subject.backend.list():
        await subject.backend.stop(sandbox.agent_id, grace=0)
    after = subject.residue()
    await subject.backend.close()
    assert after == before, (after - before, before - after)


def pid_of(identity: ProcessIdentity | None) -> int:
    assert identity is not None
    return identity.pid


async def test_killing_the_shim_kills_the_vm(subject: MicrovmSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    record = subject.record(sandbox)
    os.kill(pid_of(record.shim), signal.SIGKILL)
    seen = await exited(subject.backend, sandbox)
    assert (seen.exit_status, seen.exit_reason) == (None, "its shim was killed, and the agent with it")


async def test_the_exit_reason_names_a_killed_qemu(subject: MicrovmSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    os.kill(pid_of(subject.record(sandbox).machine), signal.SIGKILL)
    seen = await exited(subject.backend, sandbox)
    assert (seen.exit_status, seen.exit_reason) == (-9, "QEMU was killed by SIGKILL")


async def test_a_kernel_panic_is_reported_and_the_console_is_bounded(microvm_place: Place) -> None:
    subject = MicrovmSubject(microvm_place, log_bytes=8192)
    sandbox = await subject.backend.start(subject.request())
    directory = subject.directory(sandbox)
    await ask(sandbox, "echo the first words >/dev/ttyS0; tr '\\0' x </dev/zero | head -c 30000 >/dev/ttyS0")
    with contextlib.suppress(TimeoutError, ConnectionError):
        await ask(sandbox, "echo c >/proc/sysrq-trigger", seconds=10)
    seen = await exited(subject.backend, sandbox)
    assert seen.exit_status is None
    assert "failed" in (seen.exit_reason or "")
    shown = await subject.backend.logs(sandbox.agent_id)
    assert b"Kernel panic" in shown
    assert b"xxxx" in shown
    assert b"the first words" not in shown
    assert sum(path.stat().st_size for path in directory.path.glob("console*")) <= 8192
    await subject.backend.stop(sandbox.agent_id, grace=0)
    await subject.backend.close()


async def test_a_stop_ends_a_guest_that_ignores_the_request(subject: MicrovmSubject) -> None:
    sandbox = await subject.backend.start(subject.request())
    await ask(sandbox, "touch /deaf")
    machine = pid_of(subject.record(sandbox).machine)
    await subject.backend.stop(sandbox.agent_id, grace=0.5)
    assert not Path(f"/proc/{machine}").exists()


async def test_a_hung_boot_is_killed_and_retried(microvm_place: Place) -> None:
    from hypercore_agents.compute.microvm.vm import RunningVm

    subject = MicrovmSubject(microvm_place, template_memory_mb=0)
    before, wait, waits = subject.residue(), RunningVm.wait_until_up, 0

    async def hung_at_first(self: RunningVm, seconds: float) -> None:
        nonlocal waits
        waits += 1
        await wait(self, 0.0 if waits == 1 else seconds)

    with mock.patch.object(RunningVm, "wait_until_up", hung_at_first):
        sandbox = await subject.backend.start(subject.request())
    assert waits == 2
    assert "alive" in await ask(sandbox, "echo alive")
    assert not subject.record(sandbox).restored
    await subject.backend.stop(sandbox.agent_id)
    await subject.backend.close()
    assert subject.residue() == before


async def test_a_hanging_boot_fails_without_residue(microvm_place: Place, guest_image: Image) -> None:
    hanging = tiny_guest(guest_image, microvm_place.folder, hangs=True)
    for template_memory_mb in (0, 4096):
        subject = MicrovmSubject(
            microvm_place, image=hanging, boot_seconds=1, boot_tries=2, template_memory_mb=template_memory_mb
        )
        before = subject.residue()
        with pytest.raises(SandboxError, match="hung during 2 boots"):
            await subject.backend.start(subject.request())
        assert subject.residue() == before
        await subject.backend.close()


async def test_a_guest_that_accepts_no_identity_fails_the_start(subject: MicrovmSubject) -> None:
    with mock.patch(f"{LAUNCH}._IDENTIFIED_SECONDS", 0), pytest.raises(SandboxError, match="does not answer"):
        await subject.backend.start(subject.request())


async def test_a_start_cancelled_during_admission_leaves_nothing(
    subject: MicrovmSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, admit, loop = subject.residue(), MicrovmBackend._admit, asyncio.get_running_loop()

    def cancelled(self: MicrovmBackend, *given: Any) -> Any:
        record = admit(self, *given)
        loop.call_soon_threadsafe(start.cancel)
        return record

    monkeypatch.setattr(MicrovmBackend, "_admit", cancelled)
    request = subject.request()
    start = asyncio.create_task(subject.backend.start(request))
    with pytest.raises(asyncio.CancelledError):
        await start
    assert subject.residue() == before
    assert await subject.backend.list() == []


async def test_a_full_host_refuses_with_the_numbers_and_counts_vms(microvm_place: Place) -> None:
    subject = MicrovmSubject(microvm_place, memory_mb=2300)
    first = await subject.backend.start(subject.request())
    usage = await subject.backend.usage()
    assert usage is not None
    assert (usage.sandboxes, usage.cores_used) == (1, 1)
    more = await asyncio.gather(*(subject.backend.start(subject.request()) for _ in range(3)), return_exceptions=True)
    refused = [answer for answer in more if isinstance(answer, InsufficientResources)]
    assert len(refused) == 2, more
    assert "MB are left beside" in str(refused[0])
    for sandbox in await subject.backend.list():
        await subject.backend.stop(sandbox.agent_id, grace=0)
    usage = await subject.backend.usage()
    assert usage is not None
    assert usage.sandboxes == 0
    assert first.state is SandboxState.RUNNING
    await subject.backend.close()


async def test_a_disk_that_is_too_full_refuses_with_the_numbers(microvm_place: Place) -> None:
    subject = MicrovmSubject(microvm_place)
    before = subject.residue()
    full = capacity.HostSnapshot(load=1.0, memory_free_mb=1000, disk_mb=100_000, disk_free_mb=2048 + 63)
    with (
        mock.patch.object(capacity, "snapshot", return_value=full),
        pytest.raises(InsufficientResources, match=r"cannot hold 64 MB more \(SCRATCH_MB\): 63 of 63 MB are left"),
    ):
        await subject.backend.start(subject.request())
    assert subject.residue() == before
    await subject.backend.close()


def on_the_host() -> dict[str, int]:
    """Count the links and rules on the host that the networks of VMs could leave."""
    rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=False).stdout.count(b"\n")
    return {"rules": rules, "links": len(os.listdir("/sys/class/net"))}


def namespaces() -> set[str]:
    """Return every network namespace that a process of the host is in."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                found.add(os.readlink(process / "ns/net"))
    return found


async def test_repeated_spawns_and_deletions_leave_nothing(subject: MicrovmSubject) -> None:
    before = subject.residue(), on_the_host(), descriptor_count()
    networks: set[str] = set()
    for _ in range(CYCLES):
        pair = await asyncio.gather(*(subject.backend.start(subject.request()) for _ in range(2)))
        for sandbox in pair:
            networks.add(os.readlink(f"/proc/{pid_of(subject.record(sandbox).machine)}/ns/net"))
        assert networks & namespaces()
        await asyncio.gather(*(subject.backend.stop(sandbox.agent_id) for sandbox in pair))
    assert os.readlink("/proc/self/ns/net") not in networks
    assert (subject.residue(), on_the_host(), descriptor_count()) == before

    async def no_networks() -> bool:
        return not networks & namespaces()

    await eventually(no_networks)


_MANAGER = textwrap.dedent("""
    import asyncio, json, os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from hypercore_agents.compute.base import SandboxRequest
    from hypercore_agents.compute.microvm import launch
    from hypercore_agents.compute.microvm.backend import MicrovmBackend
    from hypercore_agents.kit.linux.cgroups import Cgroups
    from hypercore_agents.compute.host.users import AgentUsers
    from hypercore_agents.compute.microvm.shim_client import ShimConnection
    from hypercore_agents.compute.microvm.monitor import Monitor
    from hypercore_agents.compute.microvm.records import VmDirectory
    from hypercore_agents.compute.microvm.vm import GuestImage

    given = json.loads(sys.argv[2])
    step = given["step"]

    def dies(owner, name, after):
        work = getattr(owner, name)
        def dying(*arguments, **more):
            if not after: os.kill(os.getpid(), signal.SIGKILL)
            result = work(*arguments, **more)
            os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(owner, name, dying)

    if isinstance(step, int):
        write, count = VmDirectory.write, 0
        def counted(self, record):
            global count
            write(self, record)
            count += 1
            if count == step: os.kill(os.getpid(), signal.SIGKILL)
        VmDirectory.write = counted
    else:
        owner, name, after = {
            "user": (AgentUsers, "claim", True), "disk": (launch, "copy_disk", True),
            "groups": (Cgroups, "create", True), "go": (ShimConnection, "go", False),
            "restore": (Monitor, "restore", False), "identity": (ShimConnection, "send_to_guest", True),
            "keep": (ShimConnection, "detach", False),
        }[step]
        dies(owner, name, after)

    image = GuestImage(given["image_id"], Path(given["kernel"]), Path(given["initrd"]), None)
    first, stop = given["users"]
    backend = MicrovmBackend(Path(given["state"]), image=image, uid_claims=Path(given["claims"]),
        machine_uids=range(first, stop), scratch_mb=64, template_linger=600, cpu_overcommit=100)
    request = SandboxRequest(given["agent_id"], 1, 512, "http://127.0.0.1:9", "s" * 40)
    asyncio.run(backend.start(request))
""")
STEPS: list[int | str] = [1, 2, 3, 4, 5, 6, 7, "user", "disk", "groups", "go", "restore", "identity", "keep"]


async def test_killed_managers_leave_nothing(subject: MicrovmSubject, microvm_place: Place) -> None:
    before, host = subject.residue(), on_the_host()
    place, image = microvm_place, microvm_place.image

    async def killed_at(step: int | str) -> str:
        agent_id = new_agent_id()
        given = {
            "step": step, "agent_id": agent_id, "image_id": image.image_id, "kernel": str(image.kernel),
            "initrd": str(image.initrd), "state": str(place.state), "claims": str(place.claims),
            "users": [place.users.start, place.users.stop],
        }  # fmt: skip
        manager = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _MANAGER, str(Path(__file__).parents[1]), json.dumps(given)
        )
        assert await manager.wait() == -signal.SIGKILL, f"the manager survived {step}"
        return agent_id

    # Two at a time, because most of the time is the start of Python.
    agents: list[str] = []
    for pair in zip(STEPS[::2], STEPS[1::2], strict=True):
        agents += await asyncio.gather(*(killed_at(step) for step in pair))

    async def no_machines() -> bool:
        return not [name for name in subject.residue() if name.startswith("process")]

    await eventually(no_machines)

    async def all_ended() -> bool:
        seen = {sandbox.agent_id: sandbox.state for sandbox in await subject.backend.list()}
        return set(seen) == set(agents) and set(seen.values()) == {SandboxState.EXITED}

    await eventually(all_ended)
    # One agent is started again, as a restarted manager does; the others are removed.
    again = await subject.backend.start(subject.request(agents[0]))
    assert again.state is SandboxState.RUNNING
    await asyncio.gather(*(subject.backend.stop(agent_id, grace=0) for agent_id in agents))
    assert (subject.residue(), on_the_host()) == (before, host)
