"""What an agent's VM and a template's have in common: how QEMU is started under a shim, and how it is ended.

Until somebody says `keep`, a VM lives as long as the conversation with its shim, so a start that stops half-way leaves
no process.
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
from hypercore_agents.compute.host.identity import ProcessIdentity, held, send
from hypercore_agents.compute.host.users import AgentUsers
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.records import SandboxDirectory
from hypercore_agents.compute.microvm.shim_client import ShimLink, ended
from hypercore_agents.compute.microvm.sizes import SizeClass
from hypercore_agents.kit.linux.cgroups import Cgroups

if TYPE_CHECKING:
    from hypercore_agents.compute.microvm.shim_protocol import Plan

_END_SECONDS = 10.0
_SETUP_SECTORS = 0x1F1

Runner = Callable[..., Any]
"""Runs blocking work with its arguments in a thread and waits for it."""


@dataclass(frozen=True)
class GuestImage:
    """What boots: files that every user may read. `root` is None for a guest that lives in its initramfs."""

    image_id: str
    kernel: Path
    initrd: Path
    root: Path | None


@dataclass(frozen=True)
class Means:
    """What is the same for every start. `groups` is None without limits.

    `scope` sets the control groups of one state directory apart from another's. `boot_seconds` is what a boot may take
    before it counts as hung, `boot_tries` how often it is tried.
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
        """Return the machine of a size."""
        return Machine(
            self.qemu, self.accelerator, size.cores, size.memory_mb, self.tsc_khz, self.image.root is not None
        )

    def group_name(self, agent_id: str) -> str:
        """Return the name of an agent's control groups."""
        return f"hypercore-{self.scope}-{agent_id}"


class Running:
    """A VM whose QEMU runs, under a shim that ends it when `link` closes."""

    def __init__(self, link: ShimLink, monitor_socket: socket.socket, numbers: Mapping[str, int]) -> None:
        self.link = link
        self.monitor_socket = monitor_socket
        self.numbers = numbers

    async def wait_until_up(self, seconds: float) -> None:
        """Return when the guest waits for its identity. Raises TimeoutError, or SandboxError when it ended."""
        await self.link.hear_guest("waiting-for-identity", seconds)

    async def kill(self) -> None:
        """End the VM; return when nothing of it is left."""
        self.monitor_socket.close()
        self.link.close()
        if not await ended(self.link.identity, _END_SECONDS):
            with held(self.link.identity) as pidfd:
                if pidfd is not None:
                    send(pidfd, signal.SIGKILL)
            await ended(self.link.identity, _END_SECONDS)


class Vm:
    """What an agent's VM and a template's have in common."""

    def __init__(self, means: Means, machine: Machine, uid: int | None) -> None:
        self.means = means
        self.machine = machine
        self.uid = uid
        self.gateway: tuple[str, int] | None = None
        self.groups: tuple[str, ...] = ()

    async def begin(
        self,
        name: str,
        directory: SandboxDirectory,
        memory: Literal["own", "template", "clone"],
        more: Mapping[str, int],
        started: Callable[[ProcessIdentity, ProcessIdentity | None], Any],
    ) -> Running:
        """Start QEMU. `started` is told shim and QEMU, each before it does anything."""
        image = self.means.image
        ours, theirs = socket.socketpair()
        link = None
        try:
            with theirs, _opened(directory, image, whole_kernel=memory != "clone") as files:
                link = ShimLink(name)
                await started(link.identity, None)
                plan = self._plan(directory, memory, more)
                process, numbers = await link.prepare(plan, {**files, **more, "monitor": theirs.fileno()})
                await started(link.identity, process)
            running = Running(link, ours, numbers)
            await link.go()
            return running
        except BaseException:
            ours.close()
            if link is not None:
                await Running(link, ours, {}).kill()
            raise

    def _plan(
        self, directory: SandboxDirectory, memory: Literal["own", "template", "clone"], more: Mapping[str, int]
    ) -> "Plan":
        if self.uid is None:
            raise SandboxError("a virtual machine needs a user of its own")
        return {
            "arguments": self.machine.arguments(memory, more),
            "descriptors": [],
            "place": str(directory.root),
            "uid": self.uid,
            "kvm": self.means.accelerator == "kvm",
            "cgroups": [*self.groups],
            "gateway": [*self.gateway] if self.gateway else None,
            "exit": str(directory.exit),
            "log": str(directory.log),
            "console": str(directory.console),
            "log_bytes": self.means.log_bytes,
        }


@contextlib.contextmanager
def _opened(directory: SandboxDirectory, image: GuestImage, *, whole_kernel: bool) -> Iterator[dict[str, int]]:
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
            found["kernel"] = _without_its_body(found["kernel"])
            stack.callback(os.close, found["kernel"])
        yield found


def _without_its_body(kernel: int) -> int:
    """Return a descriptor of the kernel's setup part only (Linux' boot protocol, `setup_sects`), enough for a clone.

    QEMU keeps a copy of what `-kernel` names for a boot, 14 MB beside every VM. A clone never boots: its kernel is in
    its memory already. It must name one all the same, since that decides which devices it has.
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
