"""The backend that runs agents in virtual machines of this host.

All that it knows is in the sandboxes' directories and in the kernel; the object holds locks, threads and leases of
templates, so that any other object over the same state directory, in this process, in another or after a restart,
continues where it was.

The first VM of a size boots, is frozen before it is anybody, and is cloned from then on (`templates`); the agent that
asked for it is the first clone. Where templates are switched off every VM boots.

Blocking work (files, /proc, starting processes) happens in a few threads of its own; waiting for a VM happens on the
event loop, so that any number of starts and stops may wait at once.

Rejected: a pool of idle VMs kept ready (each takes its memory, and a clone is ready in a third of a second).
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hypercore_agents.compute.base import (
    Capabilities,
    ComputeBackend,
    HostUsage,
    MemoryAccount,
    Sandbox,
    SandboxError,
    SandboxRefused,
    SandboxRequest,
)
from hypercore_agents.compute.host import capacity, users
from hypercore_agents.compute.host.blocking_work import Workers, settled
from hypercore_agents.compute.host.identity import held, send
from hypercore_agents.compute.host.locks import AgentLocks
from hypercore_agents.compute.host.request_checks import is_agent_id
from hypercore_agents.compute.microvm import host_facts, requirements
from hypercore_agents.compute.microvm.admission import HostRoom, check
from hypercore_agents.compute.microvm.disks import taken_mb
from hypercore_agents.compute.microvm.launch import OVERHEAD_MB, Launcher, gateway_of
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.observing import observe
from hypercore_agents.compute.microvm.records import Record, SandboxDirectory, directories
from hypercore_agents.compute.microvm.shim_client import ended
from hypercore_agents.compute.microvm.sizes import SizeClass
from hypercore_agents.compute.microvm.template_groups import TemplateGroups
from hypercore_agents.compute.microvm.template_memory import Account, Template
from hypercore_agents.compute.microvm.templates import Templates, template_key
from hypercore_agents.compute.microvm.vm import GuestImage
from hypercore_agents.kit.linux import cgroups

MACHINE_UIDS = range(1_900_100_000, 1_900_110_000)
"""Users (and groups of the same numbers) that QEMU runs as; none of the process backend's."""

_LOG_BYTES = 4 << 20
_KVM_BOOT_SECONDS, _TCG_BOOT_SECONDS = 20.0, 120.0


class MicrovmBackend(ComputeBackend):
    """Runs each agent in a virtual machine with a kernel, a network and a disk of its own."""

    name = "microvm"

    def __init__(
        self,
        state_dir: Path,
        *,
        image: GuestImage | None = None,
        accelerator: Literal["auto", "kvm", "tcg"] = "auto",
        cpu_overcommit: float = 8.0,
        memory_mb: int | None = None,
        template_memory_mb: int = 4096,
        template_linger: float = 120.0,
        end_templates_on_close: bool = False,
        scratch_mb: int = 4096,
        boot_seconds: float | None = None,
        boot_tries: int = 3,
        machine_uids: range = MACHINE_UIDS,
        uid_claims: Path = users.CLAIMS,
        log_bytes: int = _LOG_BYTES,
        threads: int = 8,
    ) -> None:
        """Keep sandboxes under `state_dir`, and find out what this host allows. Blocking, for some tenths of a second.

        `image` is what boots (default: the newest of `hypercore-agents image build`). VMs together may have
        `cpu_overcommit` times the host's cores, and its memory or `memory_mb` of it. Templates take at most
        `template_memory_mb` (0: none are made) and stay `template_linger` seconds after the last backend that used
        them (0, or with `end_templates_on_close`: `close` ends them). Each VM has a disk of `scratch_mb`. A boot that
        takes longer than `boot_seconds` is tried again, up to `boot_tries` times in all.

        Raises SandboxRefused where no VM can run, with all that is missing.
        """
        lacking = requirements.missing()
        if lacking:
            raise SandboxRefused("the microvm backend cannot work here: " + "; ".join(lacking))
        state_dir = state_dir.absolute()
        self._folder = state_dir / "microvm"
        self._sandboxes = self._folder / "sandboxes"
        qemu = requirements.find_program(requirements.QEMU)
        assert qemu is not None
        self._facts = host_facts.look(qemu)
        found, kind, why = _image_and_accelerator(state_dir, image, accelerator)
        groups = cgroups.detect()
        self._workers = Workers(threads, "microvm-backend", self._folder)
        self._scratch_mb = scratch_mb
        self._room = HostRoom(
            self._facts.cores, memory_mb or self._facts.memory_mb, cpu_overcommit, OVERHEAD_MB, scratch_mb
        )
        self._launcher = Launcher(
            qemu=qemu,
            image=found,
            accelerator=kind,
            tsc_khz=self._facts.tsc_khz if kind == "tcg" else None,
            disks=self._folder,
            scratch_mb=scratch_mb,
            users=users.AgentUsers(machine_uids, uid_claims),
            groups=groups,
            scope=hashlib.sha256(os.fsencode(self._sandboxes)).hexdigest()[:8],
            log_bytes=log_bytes,
            boot_seconds=boot_seconds or (_KVM_BOOT_SECONDS if kind == "kvm" else _TCG_BOOT_SECONDS),
            boot_tries=boot_tries,
            run=self._workers.run,
        )
        self._template_groups = TemplateGroups(groups, self._launcher.scope)
        self._templates = Templates(
            self._folder / "templates",
            self._launcher.freeze,
            memory_mb=template_memory_mb,
            linger=template_linger,
            end_on_close=end_templates_on_close,
            overhead_mb=OVERHEAD_MB,
            room=self._memory_left_mb,
            lent=self._lent,
            groups=self._template_groups,
        )
        self.accelerator = f"{kind}: {why}"
        self.capabilities = Capabilities(
            isolation=(
                f"a virtual machine with a kernel ({kind}), network, disk and user of its own; it reaches the "
                "gateway's port and nothing else"
            ),
            separates_agents=True,
            separates_sessions=True,
            separates_network=True,
            enforced_limits=groups.enforced if groups else frozenset({"memory"}),
            session_disk="exact: each session's user has a quota of bytes and files",
            exact_disk=True,
        )
        self._locks = AgentLocks(self._folder / "locks")

    async def start(self, request: SandboxRequest) -> Sandbox:
        """Start the agent's VM; return when it has its identity and its server enrols."""
        size = check(request)
        gateway = await self._workers.run(gateway_of, request.gateway_url)
        await self._workers.run(self._make_directories)
        async with self._locks.hold(request.agent_id):
            with self._workers.translated():
                return await self._start(request, size, gateway)

    async def _start(self, request: SandboxRequest, size: SizeClass, gateway: tuple[str, int]) -> Sandbox:
        directory = self._directory(request.agent_id)
        record = await self._workers.run(directory.read)
        if record is not None and record.kept:
            return observe(directory, record)
        if record is not None:
            # A manager died in the middle of this start.
            await self._workers.run(self._launcher.undo, directory, record)
        machine = self._launcher.machine(size)
        key = self._template_key(machine)
        usage = await self._workers.run(self._usage_without_making)
        needed_mb = size.memory_mb + OVERHEAD_MB
        if needed_mb > usage.memory_mb - usage.memory_used_mb:
            # Templates are what a host can do without first.
            await self._templates.give_back(needed_mb - usage.memory_mb + usage.memory_used_mb, key)
            usage = await self._workers.run(self._usage_without_making)
        self._room.admit(request.cores, size, usage)
        template = await self._templates.get(key, machine)
        with template.in_use() if template else contextlib.nullcontext():
            try:
                record = await self._workers.run(self._admit, directory, request, size, template)
            except asyncio.CancelledError:
                # It came to its end all the same, and nobody will launch what it admitted.
                withdrawn = self._workers.begin(self._withdraw, directory)
                await settled(withdrawn)
                # What could not be undone stays in `list`; the caller has gone and cannot be told.
                withdrawn.exception()
                raise
            return observe(directory, await self._launcher.launch(directory, request, record, template, gateway))

    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        """Ask the VM to shut down, wait, end it, and remove all that it left on the host."""
        if not is_agent_id(agent_id) or not await self._workers.run(self._exists, agent_id):
            return
        await self._workers.run(self._make_directories)
        async with self._locks.hold(agent_id):
            with self._workers.translated():
                await self._stop(agent_id, grace)

    async def _stop(self, agent_id: str, grace: float) -> None:
        directory = self._directory(agent_id)
        record = await self._workers.run(directory.read)
        if record is None:
            return
        if grace > 0 and record.kept and record.shim is not None:
            with held(record.shim) as pidfd:
                if pidfd is not None:
                    send(pidfd, signal.SIGTERM)
            await ended(record.shim, grace)
        await self._workers.run(self._launcher.undo, directory, record)

    async def inspect(self, agent_id: str) -> Sandbox | None:
        """Return what the record, the exit file and the kernel say together."""
        if not is_agent_id(agent_id):
            return None
        return await self._workers.run(self._observe, self._directory(agent_id))

    async def list(self) -> list[Sandbox]:
        """Return all sandboxes under the state directory, whichever manager started them."""
        return [*await self._workers.run(self._observe_all)]

    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        """Return the end of what the agent printed, and before it, if there is room, the console."""
        if not is_agent_id(agent_id):
            return b""
        return await self._workers.run(self._directory(agent_id).tail, limit)

    async def usage(self) -> HostUsage:
        """Return what of this host is taken by VMs and templates."""
        return await self._workers.run(self._usage_with_charges)

    async def close(self) -> None:
        """Let go of templates, and end the threads; sandboxes go on running."""
        await self._templates.close()
        await self._workers.close()

    def _template_key(self, machine: Machine) -> str:
        facts = self._facts
        return template_key(
            self._launcher.image.image_id, machine, self._scratch_mb, facts.qemu_version, facts.cpu_model
        )

    # What follows blocks and runs in threads.

    def _admit(
        self, directory: SandboxDirectory, request: SandboxRequest, size: SizeClass, template: Template | None
    ) -> Record:
        """Make the sandbox's directory with its first record, if there is room, which is taken from then on."""
        descriptor = os.open(self._sandboxes, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._room.admit(request.cores, size, self._usage())
            record = Record(
                request.agent_id,
                time.time(),
                cores=request.cores,
                memory_mb=size.memory_mb,
                disk_mb=self._scratch_mb,
                origin=directory.origin,
                template=template.account.instance if template else "",
                template_mb=template.account.size_mb if template else 0,
            )
            try:
                directory.create()
                directory.write(record)
            except OSError:
                self._launcher.undo(directory, record)
                raise
            return record
        finally:
            os.close(descriptor)

    def _withdraw(self, directory: SandboxDirectory) -> None:
        record = directory.read()
        if record is not None:
            self._launcher.undo(directory, record)

    def _usage(self, *, making: bool = True) -> HostUsage:
        found = [*directories(self._sandboxes)]
        records = [record for record in (directory.read() for directory in found) if record]
        written_mb = sum(taken_mb(directory.scratch) for directory in found)
        templates_mb = self._templates.usage_mb(making=making)
        return self._room.usage(records, templates_mb, written_mb, capacity.look(self._folder))

    def _usage_with_charges(self) -> HostUsage:
        """Return what is taken, and what control groups count of it."""
        usage = self._usage()
        if not self._template_groups.count:
            return usage
        accounts = {}
        for directory in directories(self._sandboxes):
            record = directory.read()
            charged = cgroups.charged_bytes(record.cgroups) if record else None
            if record and charged is not None:
                accounts[record.agent_id] = MemoryAccount(record.memory_mb + OVERHEAD_MB, -(-charged // (1 << 20)))
        templates = MemoryAccount(self._templates.usage_mb(), self._templates.charged_mb())
        return replace(usage, agents_memory=accounts, templates_memory=templates)

    def _usage_without_making(self) -> HostUsage:
        """Return what is taken when the template that is being made is done: a start waits for that."""
        return self._usage(making=False)

    def _memory_left_mb(self) -> int:
        usage = self._usage()
        return usage.memory_mb - usage.memory_used_mb

    def _lent(self) -> tuple[Account, ...]:
        """Return the templates of all VMs."""
        records = (directory.read() for directory in directories(self._sandboxes))
        return tuple(Account(record.template, record.template_mb) for record in records if record and record.template)

    def _observe(self, directory: SandboxDirectory) -> Sandbox | None:
        record = directory.read()
        if record is not None and not record.kept and self._locks.is_held(directory.agent_id):
            # Being started or removed; unless that has just ended, there is nothing to see yet.
            record = directory.read()
            if record is None or not record.kept:
                return None
        return observe(directory, record) if record else None

    def _observe_all(self) -> tuple[Sandbox, ...]:
        found = (self._observe(directory) for directory in directories(self._sandboxes))
        return tuple(sorted((sandbox for sandbox in found if sandbox), key=lambda sandbox: sandbox.started_at))

    def _exists(self, agent_id: str) -> bool:
        return self._directory(agent_id).path.exists() or self._locks.is_held(agent_id)

    def _directory(self, agent_id: str) -> SandboxDirectory:
        return SandboxDirectory(self._sandboxes / agent_id)

    def _make_directories(self) -> None:
        try:
            for path in (self._sandboxes, self._folder / "locks"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SandboxError(f"cannot make {self._sandboxes}: {error.strerror}; check STATE_DIR") from error


def _image_and_accelerator(
    state_dir: Path, given: GuestImage | None, wanted: Literal["auto", "kvm", "tcg"]
) -> tuple[GuestImage, Literal["kvm", "tcg"], str]:
    """Return what boots, what runs it, and why that. Raises SandboxRefused without an image."""
    if given is not None:
        kind: Literal["kvm", "tcg"] = "kvm" if wanted == "kvm" else "tcg"
        return given, kind, "chosen"
    from hypercore_agents.compute.microvm.image import find

    image = find(state_dir)
    if image is None:
        raise SandboxRefused("the microvm backend has no image yet; run: hypercore-agents image build")
    guest = GuestImage(image.image_id, image.kernel, image.initrd, image.root)
    if wanted != "auto":
        return guest, wanted, "MICROVM_ACCELERATOR says so"
    from hypercore_agents.compute.microvm.accelerator import accelerator as choose

    chosen = choose(image, state_dir)
    return guest, chosen.name, chosen.reason
