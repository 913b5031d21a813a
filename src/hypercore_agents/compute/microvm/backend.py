"""The backend that runs agents in virtual machines of this host.

The first VM of a size boots without an identity and becomes a template; the agent that requested it, and all later
agents of that size, are clones (`templates`). If templates are switched off, every VM boots. Besides locks and threads,
the object holds leases of templates.

Rejected: a pool of idle VMs (each takes its memory, and a clone is ready in a third of a second).
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hypercore_agents.compute.base import (
    Capabilities,
    HostUsage,
    MemoryAccount,
    Sandbox,
    SandboxRefused,
    SandboxRequest,
)
from hypercore_agents.compute.host import capacity, users
from hypercore_agents.compute.host.host_backend import HostBackend
from hypercore_agents.compute.host.observing import observe
from hypercore_agents.compute.microvm import host_facts, requirements
from hypercore_agents.compute.microvm.admission import HostResources, check
from hypercore_agents.compute.microvm.disks import allocated_mb
from hypercore_agents.compute.microvm.launch import OVERHEAD_MB, Launcher, gateway_of
from hypercore_agents.compute.microvm.machine import Machine
from hypercore_agents.compute.microvm.records import VmDirectory, VmRecord
from hypercore_agents.compute.microvm.sizes import SizeClass
from hypercore_agents.compute.microvm.template_groups import TemplateGroups
from hypercore_agents.compute.microvm.template_memory import Template, TemplateInstance
from hypercore_agents.compute.microvm.templates import Templates, template_key
from hypercore_agents.compute.microvm.vm import GuestImage
from hypercore_agents.kit.linux import cgroups

MACHINE_UIDS = range(1_900_100_000, 1_900_110_000)
"""Users (and groups of the same numbers) of QEMU, disjoint from those of the process backend."""

_LOG_BYTES = 4 << 20
_KVM_BOOT_SECONDS, _TCG_BOOT_SECONDS = 20.0, 120.0


class MicrovmBackend(HostBackend[VmDirectory]):
    """Runs each agent in a virtual machine with its own kernel, network and disk."""

    name = "microvm"
    directory_type = VmDirectory

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
        """Keep sandboxes under `state_dir`, and find out what this host allows. Blocks for some tenths of a second.

        `image` is the guest image (default: the newest of `hypercore-agents image build`). All VMs together get at most
        `cpu_overcommit` times the host's cores, and the host's memory or `memory_mb` of it. Templates take at most
        `template_memory_mb` (0: no templates) and stay for `template_linger` seconds after the last backend has
        released them (0, or with `end_templates_on_close`: `close` ends them). Each VM has a disk of `scratch_mb`. A
        boot that takes longer than `boot_seconds` is retried, up to `boot_tries` attempts in total.

        Raises SandboxRefused with everything that is missing, if this host cannot run VMs.
        """
        lacking = requirements.missing()
        if lacking:
            raise SandboxRefused("the microvm backend cannot work here: " + "; ".join(lacking))
        self._folder = state_dir.absolute() / "microvm"
        super().__init__(self._folder, threads)
        qemu = requirements.find_program(requirements.QEMU)
        assert qemu is not None
        self._facts = host_facts.read_facts(qemu)
        guest, kind, why = _image_and_accelerator(state_dir.absolute(), image, accelerator)
        groups = cgroups.detect()
        self._scratch_mb = scratch_mb
        self._resources = HostResources(
            self._facts.cores, memory_mb or self._facts.memory_mb, cpu_overcommit, OVERHEAD_MB, scratch_mb
        )
        self._launcher = Launcher(
            qemu=qemu,
            image=guest,
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
            self._launcher.create_snapshot,
            memory_mb=template_memory_mb,
            linger=template_linger,
            end_on_close=end_templates_on_close,
            overhead_mb=OVERHEAD_MB,
            available_mb=self._available_memory_mb,
            instances_in_use=self._template_instances,
            groups=self._template_groups,
        )
        self.accelerator = f"{kind}: {why}"
        self.capabilities = Capabilities(
            isolation=(
                f"a virtual machine with its own kernel ({kind}), network, disk and user; it reaches only the "
                "gateway's port"
            ),
            separates_agents=True,
            separates_sessions=True,
            separates_network=True,
            enforced_limits=groups.enforced if groups else frozenset({"memory"}),
            session_disk="exact: each session's user has a quota of bytes and files",
            exact_disk=True,
        )

    async def start(self, request: SandboxRequest) -> Sandbox:
        """Start the agent's VM; return when it has its identity and its server enrols."""
        size = check(request)
        gateway = await self._workers.run(gateway_of, request.gateway_url)
        await self._workers.run(self._make_directories)
        async with self._locks.hold(request.agent_id):
            with self._workers.translated_errors():
                return await self._start(request, size, gateway)

    async def _start(self, request: SandboxRequest, size: SizeClass, gateway: tuple[str, int]) -> Sandbox:
        directory = self._directory(request.agent_id)
        record = await self._workers.run(directory.read)
        if record is not None and record.complete:
            return observe(directory, record)
        if record is not None:
            # A manager died during this start.
            await self._workers.run(self._destroy, directory, record)
        machine = self._launcher.machine(size)
        key = self._template_key(machine)
        usage = await self._workers.run(self._usage_without_unfinished)
        needed_mb = size.memory_mb + OVERHEAD_MB
        if needed_mb > usage.memory_mb - usage.memory_used_mb:
            # Agents take precedence over templates.
            await self._templates.free_memory(needed_mb - usage.memory_mb + usage.memory_used_mb, key)
            usage = await self._workers.run(self._usage_without_unfinished)
        self._resources.admit(request.cores, size, usage)
        template = await self._templates.get(key, machine)
        with template.in_use() if template else contextlib.nullcontext():
            try:
                record = await self._workers.run(self._admit, directory, request, size, template)
            except asyncio.CancelledError:
                # The admission has completed in its thread, but the VM will not be launched.
                await self._destroy_abandoned(directory)
                raise
            return observe(directory, await self._launcher.launch(directory, request, record, template, gateway))

    async def usage(self) -> HostUsage:
        """Return the resources of this host that VMs and templates use."""
        return await self._workers.run(self._usage_with_charges)

    async def close(self) -> None:
        """Release templates, and end the threads. Sandboxes continue to run."""
        await self._templates.close()
        await super().close()

    def _template_key(self, machine: Machine) -> str:
        facts = self._facts
        return template_key(
            self._launcher.image.image_id, machine, self._scratch_mb, facts.qemu_version, facts.cpu_model
        )

    # The methods below block and run in threads.

    def _admit(
        self, directory: VmDirectory, request: SandboxRequest, size: SizeClass, template: Template | None
    ) -> VmRecord:
        """Create the sandbox's directory with its first record, which counts from then on, if the VM fits."""
        descriptor = os.open(self._sandboxes, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._resources.admit(request.cores, size, self._usage())
            record = VmRecord(
                request.agent_id,
                time.time(),
                cores=request.cores,
                memory_mb=size.memory_mb,
                disk_mb=self._scratch_mb,
                origin=directory.origin,
                template=template.instance.name if template else "",
                template_mb=template.instance.size_mb if template else 0,
            )
            try:
                directory.create()
                directory.write(record)
            except OSError:
                self._destroy(directory, record)
                raise
            return record
        finally:
            os.close(descriptor)

    def _destroy(self, directory: VmDirectory, record: VmRecord) -> None:
        self._launcher.undo(directory, record)

    def _usage(self, *, include_unfinished: bool = True) -> HostUsage:
        found = [*self._directories()]
        records = [record for record in (directory.read() for directory in found) if record]
        allocated = sum(allocated_mb(directory.scratch) for directory in found)
        templates_mb = self._templates.usage_mb(include_unfinished=include_unfinished)
        return self._resources.usage(records, templates_mb, allocated, capacity.snapshot(self._folder))

    def _usage_with_charges(self) -> HostUsage:
        """Return the usage, with the memory that control groups count."""
        usage = self._usage()
        if not self._template_groups.enabled:
            return usage
        accounts = {}
        for directory in self._directories():
            record = directory.read()
            charged = cgroups.charged_bytes(record.cgroups) if record else None
            if record and charged is not None:
                accounts[record.agent_id] = MemoryAccount(record.memory_mb + OVERHEAD_MB, -(-charged // (1 << 20)))
        templates = MemoryAccount(self._templates.usage_mb(), self._templates.charged_mb())
        return replace(usage, agents_memory=accounts, templates_memory=templates)

    def _usage_without_unfinished(self) -> HostUsage:
        """Return the usage without the template that is being created: a start waits for that one."""
        return self._usage(include_unfinished=False)

    def _available_memory_mb(self) -> int:
        usage = self._usage()
        return usage.memory_mb - usage.memory_used_mb

    def _template_instances(self) -> tuple[TemplateInstance, ...]:
        """Return the template instances of all VMs."""
        records = (directory.read() for directory in self._directories())
        return tuple(
            TemplateInstance(record.template, record.template_mb) for record in records if record and record.template
        )


def _image_and_accelerator(
    state_dir: Path, given: GuestImage | None, wanted: Literal["auto", "kvm", "tcg"]
) -> tuple[GuestImage, Literal["kvm", "tcg"], str]:
    """Return guest image, accelerator, and the reason for the accelerator. Raises SandboxRefused without an image."""
    if given is not None:
        kind: Literal["kvm", "tcg"] = "kvm" if wanted == "kvm" else "tcg"
        return given, kind, "chosen"
    from hypercore_agents.compute.microvm.image import find

    image = find(state_dir)
    if image is None:
        raise SandboxRefused("the microvm backend has no image yet; run: hypercore-agents image build")
    guest = GuestImage(image.image_id, image.kernel, image.initrd, image.root)
    if wanted != "auto":
        return guest, wanted, "set by MICROVM_ACCELERATOR"
    from hypercore_agents.compute.microvm.accelerator import accelerator as choose

    chosen = choose(image, state_dir)
    return guest, chosen.name, chosen.reason
