"""Support for tests of the microvm backend: a state directory with a template, backends over it, and leftovers."""

import asyncio
import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from hypercore_agents.compute.base import Sandbox, SandboxError
from hypercore_agents.compute.host.users import AgentUsers
from hypercore_agents.compute.microvm import requirements, shim
from hypercore_agents.compute.microvm.backend import MicrovmBackend
from hypercore_agents.compute.microvm.image import Image
from hypercore_agents.compute.microvm.monitor import Monitor
from hypercore_agents.compute.microvm.records import VmDirectory, VmRecord
from hypercore_agents.compute.microvm.sizes import SIZE_CLASSES
from hypercore_agents.compute.testing.conformance import Subject
from hypercore_agents.kit.linux.cgroups import Cgroups
from support.descriptors import descriptors
from support.folders_in_use import entries_below
from support.microvm_guest import tiny_guest
from support.sandboxes import failing_write

LAUNCH = "hypercore_agents.compute.microvm.launch"
_numbers = itertools.count()


def cannot_run() -> str | None:
    """Return what this host lacks for tests with VMs, None if nothing."""
    return "; ".join(requirements.missing()) or None


async def ask(sandbox: Sandbox, order: str, *, seconds: float = 60.0) -> str:
    """Let the tiny guest run a shell command, and return its output."""
    host, port = sandbox.address.removeprefix("http://").split(":")
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(order.encode() + b"\n")
            return (await reader.read()).decode(errors="replace")
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class Place:
    """A state directory for a test run, with one template that outlives every backend of the run."""

    def __init__(self, image: Image) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hypercore-microvm-"))
        self.state = self.folder / "state"
        self.claims = self.folder / "uids"
        first = 1_800_000_000 + 1000 * (os.getpid() % 100_000) + 200 * (next(_numbers) % 5)
        self.users = range(first, first + 200)
        self.image = tiny_guest(image, self.folder)

    def backend(self, **options: Any) -> MicrovmBackend:
        given: dict[str, Any] = {
            "image": self.image,
            "uid_claims": self.claims,
            "machine_uids": self.users,
            "scratch_mb": 64,
            "template_linger": 600,
            "log_bytes": MicrovmSubject.log_limit,
            "cpu_overcommit": 100,
        }
        return MicrovmBackend(self.state, **(given | options))

    async def close(self) -> None:
        """End all sandboxes and templates, and remove the folder."""
        backend = self.backend(template_linger=0)
        for sandbox in await backend.list():
            await backend.stop(sandbox.agent_id, grace=0)
        backend._templates.end_all([path.name for path in (self.state / "microvm/templates").glob("*")])
        await backend.close()
        shutil.rmtree(self.folder)

    @property
    def scope(self) -> str:
        """The prefix of the names of this folder's control groups."""
        sandboxes = self.state / "microvm" / "sandboxes"
        return f"hypercore-{hashlib.sha256(os.fsencode(sandboxes)).hexdigest()[:8]}-"

    def residue(self) -> frozenset[str]:
        """Return all traces of agents here: processes, files, control groups, users, descriptors, namespaces."""
        folders = (self.state / "microvm" / name for name in ("sandboxes", "locks"))
        found = {str(path) for folder in folders for path in entries_below(folder)}
        found |= {str(path) for path in self.claims.glob("*")}
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and self._is_ours(process):
                found.add(f"process {process.name}")
        groups = (f"{above}/{name}" for above, below, _ in os.walk("/sys/fs/cgroup") for name in below)
        found.update(path for path in groups if f"/{self.scope}" in path)
        for _, target in descriptors():
            # A backend keeps the lease of its template.
            if "/proc/" not in target and not target.startswith(("/memfd:", "socket:")):
                found.add(f"descriptor of {target}")
        return frozenset(found)

    def _is_ours(self, process: Path) -> bool:
        try:
            status = (process / "status").read_text()
            if "State:\tZ" in status:
                return False  # ended; its parent will reap it
            if int(status.split("Uid:\t")[1].split()[0]) in self.users:
                return True
            ours = int(status.split("PPid:\t")[1].split()[0]) == os.getpid()
            return ours and b"microvm.shim" in (process / "cmdline").read_bytes()
        except (OSError, IndexError):
            return False


class MicrovmSubject(Subject):
    """A microvm backend whose VMs are tiny guests."""

    log_limit = 64 * 1024

    def __init__(self, place: Place, **options: Any) -> None:
        self.place = place
        self.options = options
        self._opened = self.successor()
        self.backend = self._opened

    def successor(self) -> MicrovmBackend:
        return self.place.backend(**self.options)

    async def end(self, sandbox: Sandbox, status: int) -> None:
        with contextlib.suppress(ConnectionError):
            message = f'{{"exited": {{"status": {status}}}}}'
            await ask(sandbox, f"echo '{message}' >/say; usleep 100000; poweroff -f")

    async def print(self, sandbox: Sandbox, text: str, times: int = 1) -> None:
        escaped = text.replace("\n", "\\n")
        await ask(sandbox, f"for i in $(seq {times}); do printf '%b' '{escaped}'; done >/hypercore.log")

    def directory(self, sandbox: Sandbox) -> VmDirectory:
        return VmDirectory(self.place.state / "microvm" / "sandboxes" / sandbox.agent_id)

    def record(self, sandbox: Sandbox) -> VmRecord:
        record = self.directory(sandbox).read()
        assert record is not None
        return record

    def breakages(self) -> Mapping[str, Callable[[], AbstractContextManager[object]]]:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        steps: dict[str, Callable[[], AbstractContextManager[object]]] = {
            "directory": lambda: mock.patch.object(VmDirectory, "create", side_effect=full),
            "user": lambda: mock.patch.object(AgentUsers, "claim", side_effect=full),
            "disk": lambda: mock.patch(f"{LAUNCH}.copy_disk", side_effect=full),
            "group": lambda: mock.patch.object(Cgroups, "create", side_effect=full),
            "socket": lambda: mock.patch("socket.socket.listen", side_effect=full),
            "spawn": lambda: mock.patch("os.posix_spawn", side_effect=full),
            "shim ends at once": lambda: mock.patch.object(shim, "PROGRAM", "raise SystemExit"),
            "confinement": lambda: _changed_plan(place="/nowhere"),
            "QEMU's arguments": lambda: _changed_plan(arguments=["/usr/bin/qemu-system-x86_64", "--nonsense"]),
            "restore": lambda: mock.patch.object(Monitor, "restore", side_effect=SandboxError("not restored")),
            "identity": lambda: mock.patch(f"{LAUNCH}._IDENTIFIED_SECONDS", 0),
        }
        # first record, user, groups, address, shim, machine, detached
        for write in range(7):
            steps[f"record, write {write + 1}"] = partial(failing_write, VmDirectory, write, full)
        return steps

    async def prepare(self) -> None:
        """Take a lease of the template, which may be created first: the creation survives a cancelled start."""
        machine = self._opened._launcher.machine(SIZE_CLASSES[0])
        await self._opened._templates.get(self._opened._template_key(machine), machine)

    def residue(self) -> frozenset[str]:
        return self.place.residue()


@contextmanager
def _changed_plan(**changes: Any) -> Iterator[None]:
    from hypercore_agents.compute.microvm.vm import VmStart

    plan = VmStart._plan

    def changed(self: VmStart, *arguments: Any) -> Any:
        return {**plan(self, *arguments), **changes}

    with mock.patch.object(VmStart, "_plan", changed):
        yield
