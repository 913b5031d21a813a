"""Creates the snapshot of a template: boots a VM without an identity and saves it, with its memory in memfds."""

import os
from pathlib import Path

from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.host.sandbox_directory import EXIT_BYTES
from hypercore_agents.compute.microvm.boot import boot
from hypercore_agents.compute.microvm.disks import copy_disk, empty_disk
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.monitor import monitor
from hypercore_agents.compute.microvm.records import VmDirectory
from hypercore_agents.compute.microvm.template_memory import Snapshot
from hypercore_agents.compute.microvm.vm import RunningVm, VmSettings, VmStart

_MEMFD = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC


class TemplateStart(VmStart):
    """The start of the VM that becomes a template."""

    def __init__(self, settings: VmSettings, machine: Machine, folder: Path, uid: int, groups: tuple[str, ...]) -> None:
        super().__init__(settings, machine, uid)
        self.groups = groups
        self._directory = VmDirectory(folder)

    async def snapshot(self) -> Snapshot:
        """Boot the VM, save it, and end it. Raises SandboxError or OSError."""
        settings, directory = self.settings, self._directory
        await settings.run(self._prepare)
        snapshot = Snapshot({}, os.memfd_create("hypercore-state", _MEMFD), directory.scratch)
        try:
            for name, size_mb in self.machine.blocks().items():
                snapshot.memory[name] = os.memfd_create("hypercore-template", _MEMFD)
                os.ftruncate(snapshot.memory[name], size_mb << 20)

            async def start() -> RunningVm:
                return await self.start_qemu("template", directory, "template", snapshot.memory, _without_record)

            running = await boot(start, seconds=settings.boot_seconds, tries=settings.boot_tries)
            try:
                async with monitor(running.monitor_socket) as qemu:
                    await qemu.save(snapshot.state)
            finally:
                await running.kill()
            return snapshot
        except BaseException:
            snapshot.close()
            raise

    def _prepare(self) -> None:
        directory = self._directory
        directory.root.mkdir(mode=0o700)
        directory.exit.write_bytes(b" " * EXIT_BYTES)
        copy_disk(empty_disk(self.settings.disks, self.settings.scratch_mb), directory.scratch, self.uid)


async def _without_record(shim: ProcessIdentity, machine: ProcessIdentity | None) -> None:
    return
