"""The one way in which a VM starts: as an agent, or as a template that is frozen.

    directory, room, user, disk, groups → socket → shim → record → QEMU → (restore | boot) → identity → serve → keep

The record is ahead of every step that leaves something outside the directory. Until `keep` the VM lives only as long as
the conversation with its shim, so whoever dies, fails or is cancelled in between leaves no process; the rest is found
by the record, and a step that fails undoes all by `teardown.destroy`, as a stop would.

The agent's socket is bound and listening from the start: the address is known at once, nobody can take the port, and
whoever connects early waits in its queue. The enrolment secret goes over the control port, in the one message that
makes the VM somebody; it is nowhere else, and no template ever saw one.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from hypercore_agents.api.guest import Identity
from hypercore_agents.compute.base import SandboxError, SandboxRefused, SandboxRequest
from hypercore_agents.compute.host.identity import ProcessIdentity, held, send
from hypercore_agents.compute.host.limits import Cgroups, Limits
from hypercore_agents.compute.host.users import AgentUsers
from hypercore_agents.compute.microvm.boot import boot
from hypercore_agents.compute.microvm.disks import copy_disk, empty_disk
from hypercore_agents.compute.microvm.link import ShimLink, ended
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.monitor import monitor
from hypercore_agents.compute.microvm.records import EXIT_BYTES, Record, SandboxDirectory
from hypercore_agents.compute.microvm.sizes import SizeClass, size_class
from hypercore_agents.compute.microvm.teardown import clear_groups, destroy
from hypercore_agents.compute.microvm.templates import Frozen, Template

if TYPE_CHECKING:
    from hypercore_agents.compute.microvm.shim import Plan

T = TypeVar("T")
_BACKLOG = 1024
_ENTROPY_BYTES = 64
_IDENTIFIED_SECONDS = 30.0
_END_SECONDS = 10.0
_OVERHEAD_PROCESSES = 128
OVERHEAD_MB = 256
"""What QEMU itself may take beside the VM's memory: translated code (128 MB), devices, its libraries."""


@dataclass(frozen=True)
class GuestImage:
    """What boots: files that every user may read. `root` is None for a guest that lives in its initramfs."""

    image_id: str
    kernel: Path
    initrd: Path
    root: Path | None


@dataclass(frozen=True)
class Launcher:
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
    run: "Runner"

    def machine(self, size: SizeClass) -> Machine:
        """Return the machine of a size."""
        return Machine(
            self.qemu, self.accelerator, size.cores, size.memory_mb, self.tsc_khz, self.image.root is not None
        )

    async def launch(
        self,
        directory: SandboxDirectory,
        request: SandboxRequest,
        record: Record,
        template: Template | None,
        gateway: tuple[str, int],
    ) -> Record:
        """Start the VM whose directory and `record` were made; return the complete record.

        With a template it is cloned from that, without one it boots. `gateway` is what the island's gateway leads to.

        Raises SandboxError, SandboxRefused or NoRoom, and then nothing is left; where something is, it is on record.
        """
        start = _Start(self, directory, request, record, template, gateway)
        try:
            return await start.launch()
        except BaseException as error:
            undone = asyncio.ensure_future(self.run(self.undo, directory, start.record))
            await _settled(undone)
            if isinstance(error, OSError):
                raise SandboxError(f"cannot start {request.agent_id}: {error}") from error
            if not isinstance(error, asyncio.CancelledError):
                undone.result()
            raise

    async def freeze(self, machine: Machine, folder: Path) -> Frozen:
        """Boot a VM that is nobody's and freeze it; its files are in `folder`. Raises SandboxError."""
        uid = await self.run(self.users.claim, folder)
        try:
            return await _Freeze(self, machine, folder, uid).freeze()
        except OSError as error:
            raise SandboxError(f"cannot make a template: {error}") from error
        finally:
            await self.run(self.users.release, uid, folder)

    def undo(self, directory: SandboxDirectory, record: Record) -> None:
        """Remove all that there may be of a sandbox. Raises SandboxError."""
        if not record.cgroups and self.groups:
            # A record that was lost, or of a start that had not come so far: here they would be.
            record = replace(record, cgroups=self.groups.paths(self.group_name(record.agent_id)))
        destroy(directory, record, self.users)

    def group_name(self, agent_id: str) -> str:
        """Return the name of an agent's control groups."""
        return f"hypercore-{self.scope}-{agent_id}"


Runner = Callable[..., Any]
"""Runs blocking work with its arguments in a thread and waits for it."""


class _Running:
    """A VM whose QEMU runs, under a shim that ends it when `link` closes."""

    def __init__(self, link: ShimLink, monitor_socket: socket.socket, numbers: Mapping[str, int]) -> None:
        self.link = link
        self.monitor_socket = monitor_socket
        self.numbers = numbers

    async def wait_until_up(self, seconds: float) -> None:
        await self.link.hear_guest("waiting-for-identity", seconds)

    async def kill(self) -> None:
        self.monitor_socket.close()
        self.link.close()
        if not await ended(self.link.identity, _END_SECONDS):
            with held(self.link.identity) as pidfd:
                if pidfd is not None:
                    send(pidfd, signal.SIGKILL)
            await ended(self.link.identity, _END_SECONDS)


class _Vm:
    """What an agent's VM and a template's have in common."""

    def __init__(self, launcher: Launcher, machine: Machine, uid: int | None) -> None:
        self.launcher = launcher
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
    ) -> _Running:
        """Start QEMU. `started` is told shim and QEMU, each before it does anything."""
        image = self.launcher.image
        ours, theirs = socket.socketpair()
        link = None
        try:
            with theirs, _opened(directory, image) as files:
                link = ShimLink(name)
                await started(link.identity, None)
                plan = self._plan(directory, memory)
                process, numbers = await link.prepare(plan, {**files, **more, "monitor": theirs.fileno()})
                await started(link.identity, process)
            running = _Running(link, ours, numbers)
            await link.go()
            return running
        except BaseException:
            ours.close()
            if link is not None:
                await _Running(link, ours, {}).kill()
            raise

    def _plan(self, directory: SandboxDirectory, memory: Literal["own", "template", "clone"]) -> "Plan":
        if self.uid is None:
            raise SandboxError("a virtual machine needs a user of its own")
        return {
            "arguments": self.machine.arguments(memory),
            "descriptors": [],
            "place": str(directory.root),
            "uid": self.uid,
            "kvm": self.launcher.accelerator == "kvm",
            "cgroups": [*self.groups],
            "gateway": [*self.gateway] if self.gateway else None,
            "exit": str(directory.exit),
            "log": str(directory.log),
            "console": str(directory.console),
            "log_bytes": self.launcher.log_bytes,
        }


class _Freeze(_Vm):
    """A template under way."""

    def __init__(self, launcher: Launcher, machine: Machine, folder: Path, uid: int) -> None:
        super().__init__(launcher, machine, uid)
        self._directory = SandboxDirectory(folder)

    async def freeze(self) -> Frozen:
        launcher, directory = self.launcher, self._directory
        await launcher.run(self._prepare)
        memory = os.memfd_create("hypercore-template", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        state = -1
        try:
            os.ftruncate(memory, self.machine.memory_mb << 20)

            async def begin() -> _Running:
                return await self.begin("template", directory, "template", {"ram": memory}, _nobody)

            running = await boot(begin, seconds=launcher.boot_seconds, tries=launcher.boot_tries)
            try:
                state = os.memfd_create("hypercore-state", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
                async with monitor(running.monitor_socket) as qemu:
                    await qemu.save(state)
            finally:
                await running.kill()
            return Frozen(memory, state, directory.scratch)
        except BaseException:
            os.close(memory)
            if state >= 0:
                os.close(state)
            raise

    def _prepare(self) -> None:
        directory = self._directory
        directory.root.mkdir(mode=0o700)
        directory.exit.write_bytes(b" " * EXIT_BYTES)
        copy_disk(empty_disk(self.launcher.disks, self.launcher.scratch_mb), directory.scratch, self.uid)


class _Start(_Vm):
    """An agent's start under way. `record` says at any moment what there is to undo."""

    def __init__(
        self,
        launcher: Launcher,
        directory: SandboxDirectory,
        request: SandboxRequest,
        record: Record,
        template: Template | None,
        gateway: tuple[str, int],
    ) -> None:
        super().__init__(launcher, launcher.machine(size_class(record.cores, record.memory_mb)), None)
        self.record = record
        self._directory = directory
        self._request = request
        self._template = template
        self.gateway = gateway

    async def launch(self) -> Record:
        launcher, request = self.launcher, self._request
        await launcher.run(self._prepare)
        with _listener() as listener:
            await self._note(address=f"http://127.0.0.1:{listener.getsockname()[1]}")

            async def begin() -> _Running:
                return await self._begin(listener.fileno())

            if self._template is None:
                running = await boot(begin, seconds=launcher.boot_seconds, tries=launcher.boot_tries)
            else:
                running = await begin()
            try:
                if self._template is not None:
                    async with monitor(running.monitor_socket) as qemu:
                        await qemu.restore(running.numbers["state"])
                running.link.tell_guest(self._identity().line())
                try:
                    await running.link.hear_guest("identified", _IDENTIFIED_SECONDS)
                except TimeoutError:
                    raise SandboxError(f"cannot start {request.agent_id}: its virtual machine is silent") from None
                await self._note(kept=True, restored=self._template is not None)
                await running.link.keep()
            except BaseException:
                await running.kill()
                raise
            running.monitor_socket.close()
            running.link.close()
        return self.record

    async def _begin(self, listener: int) -> _Running:
        template = self._template
        if template is None:
            return await self.begin(
                self.record.agent_id, self._directory, "own", {"listener": listener}, self._note_processes
            )
        # Opened anew: a descriptor that is only copied shares its position with every other clone's.
        state = os.open(f"/proc/self/fd/{template.state}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            more = {"listener": listener, "ram": template.memory, "state": state}
            return await self.begin(self.record.agent_id, self._directory, "clone", more, self._note_processes)
        finally:
            os.close(state)

    async def _note_processes(self, shim: ProcessIdentity, machine: ProcessIdentity | None) -> None:
        await self._note(shim=shim, machine=machine)

    async def _note(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        await self.launcher.run(self._directory.write, self.record)

    def _prepare(self) -> None:
        launcher, directory, request = self.launcher, self._directory, self._request
        self.uid = launcher.users.claim(directory.path)
        self.record = replace(self.record, uid=self.uid)
        directory.write(self.record)
        template = self._template
        disk = template.scratch if template else empty_disk(launcher.disks, launcher.scratch_mb)
        copy_disk(disk, directory.scratch, self.uid)
        if launcher.groups is None:
            return
        name = launcher.group_name(request.agent_id)
        self.groups = launcher.groups.paths(name)
        # Whoever deleted a state directory by hand left groups behind.
        clear_groups(self.groups)
        self.record = replace(self.record, cgroups=self.groups)
        directory.write(self.record)
        memory_mb = self.record.memory_mb + OVERHEAD_MB
        launcher.groups.create(name, Limits(request.cores, memory_mb, _OVERHEAD_PROCESSES + self.record.cores))

    def _identity(self) -> Identity:
        request = self._request
        return Identity(
            agent_id=request.agent_id,
            hostname=request.agent_id.replace("_", "-").lower()[:63],
            clock=time.time(),
            entropy=secrets.token_bytes(_ENTROPY_BYTES),
            enrolment_secret=request.enrolment_secret,
            environment={**request.environment, "AGENT_MEMORY_MB": str(self.record.memory_mb)},
        )


def gateway_of(url: str) -> tuple[str, int]:
    """Return host and port of the gateway, as this host reaches it. Raises SandboxRefused."""
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise SandboxRefused(
            "gateway_url: a virtual machine reaches the gateway over a link of its own, as http://HOST:PORT; "
            "set GATEWAY_URL to that",
            field="gateway_url",
        )
    try:
        return str(socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0][4][0]), port
    except OSError as error:
        raise SandboxError(f"the gateway's host {parts.hostname} is unknown: {error.strerror}") from error


async def _nobody(shim: ProcessIdentity, machine: ProcessIdentity | None) -> None:
    return


@contextlib.contextmanager
def _opened(directory: SandboxDirectory, image: GuestImage) -> Iterator[dict[str, int]]:
    """Give the descriptors of the VM's files."""
    with contextlib.ExitStack() as stack:
        found = {}
        files = {"kernel": image.kernel, "initrd": image.initrd, "root": image.root, "scratch": directory.scratch}
        for name, path in files.items():
            if path is not None:
                flags = os.O_RDWR if name == "scratch" else os.O_RDONLY
                found[name] = os.open(path, flags | os.O_CLOEXEC)
                stack.callback(os.close, found[name])
        yield found


@contextlib.contextmanager
def _listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(_BACKLOG)
        yield listener


async def _settled(future: asyncio.Future[T]) -> None:
    """Wait until the future is done, also when cancelled meanwhile."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
