"""Starts the VM of an agent, as a clone of a template or by a boot; and starts the VM that becomes a template.

    directory, capacity, user, disk, groups → socket → shim → record → QEMU → (restore | boot) → identity → serve → keep

The record is written before every step that creates something outside the directory. Until `keep`, the VM ends when the
connection to its shim closes, so a start that fails or is cancelled, or whose manager dies, leaves no process. The
record leads to the rest, and `teardown.destroy` undoes it, as for a stop.

The agent's socket is bound and listening from the start: the address is known at once, no other program can take the
port, and early connections wait in its queue. The enrolment secret goes over the control port in the message that gives
the VM its identity. It is nowhere else, and no template has ever had one.
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
from hypercore_agents.compute.host.blocking_work import wait_until_done
from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.host.spawning import open_listener
from hypercore_agents.compute.host.teardown import clear_groups
from hypercore_agents.compute.microvm.boot import boot
from hypercore_agents.compute.microvm.disks import copy_disk, empty_disk
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.monitor import monitor
from hypercore_agents.compute.microvm.records import VmDirectory, VmRecord
from hypercore_agents.compute.microvm.sizes import size_class
from hypercore_agents.compute.microvm.teardown import destroy
from hypercore_agents.compute.microvm.template_creation import TemplateStart
from hypercore_agents.compute.microvm.template_memory import Snapshot, Template
from hypercore_agents.compute.microvm.vm import RunningVm, VmSettings, VmStart
from hypercore_agents.kit.linux.cgroups import Limits

_ENTROPY_BYTES = 64
_IDENTIFIED_SECONDS = 30.0
_OVERHEAD_PROCESSES = 128
_WITHOUT_KVM = {"CLI_START_TIMEOUT": "60"}
"""Settings of an agent under TCG, where the start of a CLI takes twenty seconds of CPU time. The SDK does not wait
longer than this."""
OVERHEAD_MB = 256
"""Memory of QEMU besides the VM's: translated code (128 MB), devices and libraries."""


class Launcher(VmSettings):
    """Starts VMs, and undoes starts."""

    async def launch(
        self,
        directory: VmDirectory,
        request: SandboxRequest,
        record: VmRecord,
        template: Template | None,
        gateway: tuple[str, int],
    ) -> VmRecord:
        """Start the VM whose directory and `record` exist already; return the complete record.

        With a template the VM is a clone, without one it boots. `gateway` is the target of the gateway's port in the
        VM's network.

        Raises SandboxError, SandboxRefused or InsufficientResources after undoing the start. Anything that cannot be
        undone stays on record.
        """
        start = _AgentStart(self, directory, request, record, template, gateway)
        try:
            return await start.launch()
        except BaseException as error:
            undone = asyncio.ensure_future(self.run(self.undo, directory, start.record))
            await wait_until_done(undone)
            if isinstance(error, OSError):
                raise SandboxError(f"cannot start {request.agent_id}: {error}") from error
            if not isinstance(error, asyncio.CancelledError):
                undone.result()
            raise

    async def create_snapshot(self, machine: Machine, folder: Path, groups: Sequence[str]) -> Snapshot:
        """Boot a VM without an identity in control groups, with its files in `folder`, and save it.

        Raises SandboxError.
        """
        uid = await self.run(self.users.claim, folder)
        try:
            return await TemplateStart(self, machine, folder, uid, tuple(groups)).snapshot()
        except OSError as error:
            raise SandboxError(f"cannot create a template: {error}") from error
        finally:
            await self.run(self.users.release, uid, folder)

    def undo(self, directory: VmDirectory, record: VmRecord) -> None:
        """Remove everything that a start, complete or not, has created. Raises SandboxError."""
        if not record.cgroups and self.groups:
            # The record was lost, or the start did not get that far. If groups exist, they have these paths.
            record = replace(record, cgroups=self.groups.paths(self.group_name(record.agent_id)))
        destroy(directory, record, self.users)


class _AgentStart(VmStart):
    """The start of an agent's VM. `record` always describes what has to be undone."""

    def __init__(
        self,
        settings: VmSettings,
        directory: VmDirectory,
        request: SandboxRequest,
        record: VmRecord,
        template: Template | None,
        gateway: tuple[str, int],
    ) -> None:
        super().__init__(settings, settings.machine(size_class(record.cores, record.memory_mb)), None)
        self.record = record
        self._directory = directory
        self._request = request
        self._template = template
        self.gateway = gateway

    async def launch(self) -> VmRecord:
        settings, request = self.settings, self._request
        await settings.run(self._prepare)
        with open_listener() as listener:
            await self._note(address=f"http://127.0.0.1:{listener.getsockname()[1]}")

            async def start() -> RunningVm:
                return await self._start(listener.fileno())

            if self._template is None:
                running = await boot(start, seconds=settings.boot_seconds, tries=settings.boot_tries)
            else:
                running = await start()
            try:
                if self._template is not None:
                    async with monitor(running.monitor_socket) as qemu:
                        await qemu.restore(running.numbers["state"])
                running.shim.send_to_guest(self._identity().line())
                try:
                    await running.shim.receive_from_guest("identified", _IDENTIFIED_SECONDS)
                except TimeoutError:
                    raise SandboxError(
                        f"cannot start {request.agent_id}: its virtual machine does not answer"
                    ) from None
                await self._note(detached=True, restored=self._template is not None)
                await running.shim.detach()
            except BaseException:
                await running.kill()
                raise
            running.monitor_socket.close()
            running.shim.close()
        return self.record

    async def _start(self, listener: int) -> RunningVm:
        template = self._template
        agent_id, directory = self.record.agent_id, self._directory
        if template is None:
            return await self.start_qemu(agent_id, directory, "own", {"listener": listener}, self._note_processes)
        # Opened again, because a copy of the descriptor would share its position with all other clones.
        state = os.open(f"/proc/self/fd/{template.state}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            descriptors = {"listener": listener, **template.memory, "state": state}
            return await self.start_qemu(agent_id, directory, "clone", descriptors, self._note_processes)
        finally:
            os.close(state)

    async def _note_processes(self, shim: ProcessIdentity, machine: ProcessIdentity | None) -> None:
        await self._note(shim=shim, machine=machine)

    async def _note(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        await self.settings.run(self._directory.write, self.record)

    def _prepare(self) -> None:
        settings, directory, request = self.settings, self._directory, self._request
        self.uid = settings.users.claim(directory.path)
        self.record = replace(self.record, uid=self.uid)
        directory.write(self.record)
        template = self._template
        disk = template.scratch if template else empty_disk(settings.disks, settings.scratch_mb)
        copy_disk(disk, directory.scratch, self.uid)
        if settings.groups is None:
            return
        name = settings.group_name(request.agent_id)
        self.groups = settings.groups.paths(name)
        # Groups of the same name exist if a state directory was deleted by hand.
        clear_groups(self.groups)
        self.record = replace(self.record, cgroups=self.groups)
        directory.write(self.record)
        memory_mb = self.record.memory_mb + OVERHEAD_MB
        settings.groups.create(name, Limits(request.cores, memory_mb, _OVERHEAD_PROCESSES + self.record.cores))

    def _identity(self) -> Identity:
        request = self._request
        return Identity(
            agent_id=request.agent_id,
            hostname=request.agent_id.replace("_", "-").lower()[:63],
            clock=time.time(),
            entropy=secrets.token_bytes(_ENTROPY_BYTES),
            enrolment_secret=request.enrolment_secret,
            environment={
                **(_WITHOUT_KVM if self.settings.accelerator == "tcg" else {}),
                **request.environment,
                "AGENT_MEMORY_MB": str(self.record.memory_mb),
            },
        )


def gateway_of(url: str) -> tuple[str, int]:
    """Return host and port of the gateway, as this host reaches it. Raises SandboxRefused or SandboxError."""
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise SandboxRefused(
            "gateway_url: a virtual machine reaches the gateway by plain HTTP over its own link; "
            "set GATEWAY_URL to http://HOST:PORT",
            field="gateway_url",
        )
    try:
        return str(socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0][4][0]), port
    except OSError as error:
        raise SandboxError(f"the gateway's host {parts.hostname} is unknown: {error.strerror}") from error
