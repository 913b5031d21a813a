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
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hypercore_agents.api.guest import Identity
from hypercore_agents.compute.base import SandboxError, SandboxRefused, SandboxRequest
from hypercore_agents.compute.host.blocking_work import settled
from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.host.spawning import open_listener
from hypercore_agents.compute.microvm.boot import boot
from hypercore_agents.compute.microvm.disks import copy_disk, empty_disk
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.monitor import monitor
from hypercore_agents.compute.microvm.records import Record, SandboxDirectory
from hypercore_agents.compute.microvm.sizes import size_class
from hypercore_agents.compute.microvm.teardown import clear_groups, destroy
from hypercore_agents.compute.microvm.template_creation import Freeze
from hypercore_agents.compute.microvm.template_memory import Frozen, Template
from hypercore_agents.compute.microvm.vm import Means, Running, Vm
from hypercore_agents.kit.linux.cgroups import Limits

_ENTROPY_BYTES = 64
_IDENTIFIED_SECONDS = 30.0
_OVERHEAD_PROCESSES = 128
_WITHOUT_KVM = {"CLI_START_TIMEOUT": "60"}
"""Settings of an agent whose instructions are translated: a CLI's start takes twenty seconds of CPU time there. The SDK
waits no longer than this."""
OVERHEAD_MB = 256
"""What QEMU itself may take beside the VM's memory: translated code (128 MB), devices, its libraries."""


class Launcher(Means):
    """Starts VMs, and undoes what was started."""

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

        Raises SandboxError, SandboxRefused or InsufficientResources after undoing the start. Anything that cannot be
        undone stays on record.
        """
        start = _Start(self, directory, request, record, template, gateway)
        try:
            return await start.launch()
        except BaseException as error:
            undone = asyncio.ensure_future(self.run(self.undo, directory, start.record))
            await settled(undone)
            if isinstance(error, OSError):
                raise SandboxError(f"cannot start {request.agent_id}: {error}") from error
            if not isinstance(error, asyncio.CancelledError):
                undone.result()
            raise

    async def freeze(self, machine: Machine, folder: Path, groups: Sequence[str]) -> Frozen:
        """Boot a VM that is nobody's in these control groups and freeze it; its files are in `folder`. SandboxError."""
        uid = await self.run(self.users.claim, folder)
        try:
            return await Freeze(self, machine, folder, uid, tuple(groups)).freeze()
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


class _Start(Vm):
    """An agent's start under way. `record` says at any moment what there is to undo."""

    def __init__(
        self,
        means: Means,
        directory: SandboxDirectory,
        request: SandboxRequest,
        record: Record,
        template: Template | None,
        gateway: tuple[str, int],
    ) -> None:
        super().__init__(means, means.machine(size_class(record.cores, record.memory_mb)), None)
        self.record = record
        self._directory = directory
        self._request = request
        self._template = template
        self.gateway = gateway

    async def launch(self) -> Record:
        means, request = self.means, self._request
        await means.run(self._prepare)
        with open_listener() as listener:
            await self._note(address=f"http://127.0.0.1:{listener.getsockname()[1]}")

            async def begin() -> Running:
                return await self._begin(listener.fileno())

            if self._template is None:
                running = await boot(begin, seconds=means.boot_seconds, tries=means.boot_tries)
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

    async def _begin(self, listener: int) -> Running:
        template = self._template
        if template is None:
            return await self.begin(
                self.record.agent_id, self._directory, "own", {"listener": listener}, self._note_processes
            )
        # Opened anew: a descriptor that is only copied shares its position with every other clone's.
        state = os.open(f"/proc/self/fd/{template.state}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            more = {"listener": listener, **template.memory, "state": state}
            return await self.begin(self.record.agent_id, self._directory, "clone", more, self._note_processes)
        finally:
            os.close(state)

    async def _note_processes(self, shim: ProcessIdentity, machine: ProcessIdentity | None) -> None:
        await self._note(shim=shim, machine=machine)

    async def _note(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        await self.means.run(self._directory.write, self.record)

    def _prepare(self) -> None:
        means, directory, request = self.means, self._directory, self._request
        self.uid = means.users.claim(directory.path)
        self.record = replace(self.record, uid=self.uid)
        directory.write(self.record)
        template = self._template
        disk = template.scratch if template else empty_disk(means.disks, means.scratch_mb)
        copy_disk(disk, directory.scratch, self.uid)
        if means.groups is None:
            return
        name = means.group_name(request.agent_id)
        self.groups = means.groups.paths(name)
        # Whoever deleted a state directory by hand left groups behind.
        clear_groups(self.groups)
        self.record = replace(self.record, cgroups=self.groups)
        directory.write(self.record)
        memory_mb = self.record.memory_mb + OVERHEAD_MB
        means.groups.create(name, Limits(request.cores, memory_mb, _OVERHEAD_PROCESSES + self.record.cores))

    def _identity(self) -> Identity:
        request = self._request
        return Identity(
            agent_id=request.agent_id,
            hostname=request.agent_id.replace("_", "-").lower()[:63],
            clock=time.time(),
            entropy=secrets.token_bytes(_ENTROPY_BYTES),
            enrolment_secret=request.enrolment_secret,
            environment={
                **(_WITHOUT_KVM if self.means.accelerator == "tcg" else {}),
                **request.environment,
                "AGENT_MEMORY_MB": str(self.record.memory_mb),
            },
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
