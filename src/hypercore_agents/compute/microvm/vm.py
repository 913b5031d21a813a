"""Starts QEMU under a shim, and ends it: the part that an agent's VM and a template's VM share.

Until the shim is detached, a VM ends when the connection to its shim closes, so an interrupted start leaves no process.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hypercore_agents.compute.base import SandboxError
from hypercore_agents.compute.host.identity import ProcessIdentity, pidfd_of, send_signal, wait_until_ended
from hypercore_agents.compute.host.users import AgentUsers
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.records import VmDirectory
from hypercore_agents.compute.microvm.shim_client import ShimConnection
from hypercore_agents.compute.microvm.sizes import SizeClass
from hypercore_agents.kit.linux.cgroups import Cgroups

if TYPE_CHECKING:
    from hypercore_agents.compute.microvm.shim_protocol import Plan

_END_SECONDS = 10.0
_SETUP_SECTORS = 0x1F1

MemoryKind = Literal["own", "template", "clone"]
"""The kind of a VM's memory (`Machine.arguments`)."""

Runner = Callable[..., Any]
"""Runs blocking work with its arguments in a thread and waits for it."""


@dataclass(frozen=True)
class GuestImage:
    """The files that boot, readable for every user. `root` is None for a guest whose root is its initramfs."""

    image_id: str
    kernel: Path
    initrd: Path
    root: Path | None


@dataclass(frozen=True)
class VmSettings:
    """The settings that are the same for every VM. `groups` is None without limits.

    `scope` distinguishes the control groups of this state directory from those of others. A boot that takes longer than
    `boot_seconds` counts as hung; `boot_tries` is the number of attempts.
    """

    qemu: Path
    image: GuestImage
    accelerator: Literal["kvm", "tcg"]
    tsc_khz: int | None
    disks: Path
    scratch_mb: int
    users: AgentUsers
    groups: Cgroups | None
    scope: str
    log_bytes: int
    boot_seconds: float
    boot_tries: int
    run: Runner

    def machine(self, size: SizeClass) -> Machine:
        """Return the machine of a size class."""
        return Machine(
            self.qemu, self.accelerator, size.cores, size.memory_mb, self.tsc_khz, self.image.root is not None
        )

    def group_name(self, agent_id: str) -> str:
        """Return the name of an agent's control groups."""
        return f"hypercore-{self.scope}-{agent_id}"


class RunningVm:
    """A VM whose QEMU runs, under a shim that ends it when the connection closes."""

    def __init__(self, shim: ShimConnection, monitor_socket: socket.socket, numbers: Mapping[str, int]) -> None:
        self.shim = shim
        self.monitor_socket = monitor_socket
        self.numbers = numbers

    async def wait_until_up(self, seconds: float) -> None:
        """Return when the guest waits for its identity. Raises TimeoutError, or SandboxError if the VM ended."""
        await self.shim.receive_from_guest("waiting-for-identity", seconds)

    async def kill(self) -> None:
        """End the VM; return when all its processes are gone."""
        self.monitor_socket.close()
        self.shim.close()
        if not await wait_until_ended(self.shim.identity, _END_SECONDS):
            with pidfd_of(self.shim.identity) as pidfd:
                if pidfd is not None:
                    send_signal(pidfd, signal.SIGKILL)
            await wait_until_ended(self.shim.identity, _END_SECONDS)


class VmStart:
    """The start of a VM. Subclasses start the VM of an agent or of a template."""

    def __init__(self, settings: VmSettings, machine: Machine, uid: int | None) -> None:
        self.settings = settings
        self.machine = machine
        self.uid = uid
        self.gateway: tuple[str, int] | None = None
        self.groups: tuple[str, ...] = ()

    async def start_qemu(
        self,
        name: str,
        directory: VmDirectory,
        memory: MemoryKind,
        descriptors: Mapping[str, int],
        started: Callable[[ProcessIdentity, ProcessIdentity | None], Any],
    ) -> RunningVm:
        """Start QEMU. `started` is called with the shim, and then with shim and QEMU, before either does any work."""
        image = self.settings.image
        ours, theirs = socket.socketpair()
        shim = None
        try:
            with theirs, _opened_files(directory, image, whole_kernel=memory != "clone") as files:
                shim = ShimConnection(name)
                await started(shim.identity, None)
                plan = self._plan(directory, memory, descriptors)
                process, numbers = await shim.prepare(plan, {**files, **descriptors, "monitor": theirs.fileno()})
                await started(shim.identity, process)
            running = RunningVm(shim, ours, numbers)
            await shim.go()
            return running
        except BaseException:
            ours.close()
            if shim is not None:
                await RunningVm(shim, ours, {}).kill()
            raise

    def _plan(self, directory: VmDirectory, memory: MemoryKind, descriptors: Mapping[str, int]) -> "Plan":
        if self.uid is None:
            raise SandboxError("a virtual machine needs its own user")
        return {
            "arguments": self.machine.arguments(memory, descriptors),
            "descriptors": [],
            "place": str(directory.root),
            "uid": self.uid,
            "kvm": self.settings.accelerator == "kvm",
            "cgroups": [*self.groups],
            "gateway": [*self.gateway] if self.gateway else None,
            "exit": str(directory.exit),
            "log": str(directory.log),
            "console": str(directory.console),
            "log_bytes": self.settings.log_bytes,
        }


@contextlib.contextmanager
def _opened_files(directory: VmDirectory, image: GuestImage, *, whole_kernel: bool) -> Iterator[dict[str, int]]:
    """Give the descriptors of the VM's files."""
    with contextlib.ExitStack() as stack:
        found = {}
        files = {"kernel": image.kernel, "initrd": image.initrd, "root": image.root, "scratch": directory.scratch}
        for name, path in files.items():
            if path is not None:
                flags = os.O_RDWR if name == "scratch" else os.O_RDONLY
                found[name] = os.open(path, flags | os.O_CLOEXEC)
                stack.callback(os.close, found[name])
        if not whole_kernel:
            found["kernel"] = _setup_part(found["kernel"])
            stack.callback(os.close, found["kernel"])
        yield found


def _setup_part(kernel: int) -> int:
    """Return a descriptor of the kernel's setup part only (Linux boot protocol, `setup_sects`), enough for a clone.

    QEMU keeps a copy of the `-kernel` file for a boot, 14 MB for each VM. A clone does not boot, because its kernel is
    already in its memory. It still needs the option, which determines the devices of the machine.
    """
    sectors = os.pread(kernel, 1, _SETUP_SECTORS)[0] or 4
    head = os.pread(kernel, (sectors + 1) * 512, 0)
    stub = os.memfd_create("hypercore-no-kernel", os.MFD_CLOEXEC)
    try:
        os.write(stub, head + bytes(4096))
    except BaseException:
        os.close(stub)
        raise
    return stub
