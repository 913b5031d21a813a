"""Making a template: a VM that boots, is nobody's, and is frozen with all its memory in memfds, one a block."""

import os
from pathlib import Path

from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.host.sandbox_directory import EXIT_BYTES
from hypercore_agents.compute.microvm.boot import boot
from hypercore_agents.compute.microvm.disks import copy_disk, empty_disk
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.monitor import monitor
from hypercore_agents.compute.microvm.records import SandboxDirectory
from hypercore_agents.compute.microvm.template_memory import Frozen
from hypercore_agents.compute.microvm.vm import Means, Running, Vm

_MEMFD = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC


class Freeze(Vm):
    """A template under way."""

    def __init__(self, means: Means, machine: Machine, folder: Path, uid: int, groups: tuple[str, ...]) -> None:
        super().__init__(means, machine, uid)
        self.groups = groups
        self._directory = SandboxDirectory(folder)

    async def freeze(self) -> Frozen:
        """Boot, freeze, end. Raises SandboxError or OSError."""
        means, directory = self.means, self._directory
        await means.run(self._prepare)
        frozen = Frozen({}, os.memfd_create("hypercore-state", _MEMFD), directory.scratch)
        try:
            for name, size_mb in self.machine.blocks().items():
                frozen.memory[name] = os.memfd_create("hypercore-template", _MEMFD)
                os.ftruncate(frozen.memory[name], size_mb << 20)

            async def begin() -> Running:
                return await self.begin("template", directory, "template", frozen.memory, _nobody)

            running = await boot(begin, seconds=means.boot_seconds, tries=means.boot_tries)
            try:
                async with monitor(running.monitor_socket) as qemu:
                    await qemu.save(frozen.state)
            finally:
                await running.kill()
            return frozen
        except BaseException:
            frozen.close()
            raise

    def _prepare(self) -> None:
        directory = self._directory
        directory.root.mkdir(mode=0o700)
        directory.exit.write_bytes(b" " * EXIT_BYTES)
        copy_disk(empty_disk(self.means.disks, self.means.scratch_mb), directory.scratch, self.uid)


async def _nobody(shim: ProcessIdentity, machine: ProcessIdentity | None) -> None:
    return
