"""What this backend refuses to start: what no VM can have, and what does not fit on this host now.

Memory is given once: what VMs have, and QEMU beside them, and templates, must fit in the host's memory less a reserve.
Disks are sparse, but given in full: what a VM has not written yet must still fit, or its writes would fail one day, and
the manager's own. Processors are shared: VMs together may have `cpu_overcommit` times as many cores as the host. A VM
counts from before its start until it is removed, ended ones too, because their records are what is counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hypercore_agents.compute.base import HostUsage, InsufficientResources, SandboxRefused, SandboxRequest
from hypercore_agents.compute.host import request_checks
from hypercore_agents.compute.host.capacity import HostSight
from hypercore_agents.compute.host.request_checks import refuse
from hypercore_agents.compute.microvm.records import Record
from hypercore_agents.compute.microvm.sizes import SizeClass, size_class

_ENVIRONMENT_BYTES = 32 * 1024
_RESERVED_SHARE, _RESERVED_MOST_MB = 0.1, 4096
_RESERVED_DISK_SHARE, _RESERVED_DISK_MOST_MB = 0.05, 2048
_RETRY_SECONDS = 10.0
RESERVED_NAMES = frozenset(
    {"AGENT_ID", "GATEWAY_URL", "AGENT_STATE_DIR", "AGENT_HOST", "AGENT_PORT", "AGENT_LISTEN_FD", "ENROLMENT_FD"}
)
"""Variables that the guest sets; a request cannot."""


def check(request: SandboxRequest) -> SizeClass:
    """Return the request's size class. Raises SandboxRefused for what can never be started by this backend."""
    if request.gpu_quota_mb:
        refuse("gpu_quota", "the microvm backend gives no GPU to its virtual machines; leave it out or give 0")
    if request.image is not None:
        refuse("image", "the microvm backend boots the newest of `hypercore-agents image build`; leave it out")
    request_checks.check(request, reserved_names=RESERVED_NAMES, environment_bytes=_ENVIRONMENT_BYTES)
    return size_class(request.cores, request.memory_mb)


@dataclass(frozen=True)
class HostRoom:
    """What this host has for VMs. `overhead_mb` is what each takes beside its memory, `scratch_mb` each one's disk."""

    cores: int
    memory_mb: int
    cpu_overcommit: float
    overhead_mb: int
    scratch_mb: int

    @property
    def most_cores(self) -> int:
        """Cores that VMs may have together."""
        return int(self.cores * self.cpu_overcommit)

    @property
    def most_memory_mb(self) -> int:
        """Memory that VMs and templates may have together."""
        return self.memory_mb - min(int(self.memory_mb * _RESERVED_SHARE), _RESERVED_MOST_MB)

    def usage(self, records: Iterable[Record], templates_mb: int, written_mb: int, host: HostSight) -> HostUsage:
        """Return what is taken. `written_mb` is what the VMs' disks take of the host's already."""
        taken = [record for record in records if record.memory_mb]
        reserved_mb = min(int(host.disk_mb * _RESERVED_DISK_SHARE), _RESERVED_DISK_MOST_MB)
        return HostUsage(
            cores=self.most_cores,
            cores_used=sum(record.cores for record in taken),
            memory_mb=self.most_memory_mb,
            memory_used_mb=templates_mb + sum(record.memory_mb + self.overhead_mb for record in taken),
            sandboxes=len(taken),
            disk_mb=max(0, host.disk_free_mb + written_mb - reserved_mb),
            disk_used_mb=sum(record.disk_mb for record in taken),
            load=host.load,
            memory_free_mb=host.memory_free_mb,
            disk_free_mb=host.disk_free_mb,
        )

    def admit(self, cores: int, size: SizeClass, usage: HostUsage) -> None:
        """Raise SandboxRefused if this host is too small for the VM, InsufficientResources if it is too busy now."""
        needed_mb = size.memory_mb + self.overhead_mb
        if cores > self.most_cores:
            raise SandboxRefused(
                f"cores: this host has {self.cores}, of which agents may have {self.most_cores} together "
                f"(CPU_OVERCOMMIT={self.cpu_overcommit:g}); {cores} were asked for",
                field="cores",
            )
        if needed_mb > self.most_memory_mb:
            raise SandboxRefused(
                f"memory: this host has {self.most_memory_mb} MB for agents; a virtual machine of this size takes "
                f"{needed_mb} MB",
                field="memory",
            )
        cores_left, memory_left = usage.cores - usage.cores_used, usage.memory_mb - usage.memory_used_mb
        if cores > cores_left or needed_mb > memory_left:
            raise InsufficientResources(
                f"this host has no room for {cores} cores and {needed_mb} MB: {cores_left} of {usage.cores} cores and "
                f"{memory_left} of {usage.memory_mb} MB are left beside {usage.sandboxes} agents",
                details={
                    "cores_asked": cores,
                    "cores_left": cores_left,
                    "memory_asked_mb": needed_mb,
                    "memory_left_mb": memory_left,
                },
                retry_after=_RETRY_SECONDS,
            )
        disk_left = usage.disk_mb - usage.disk_used_mb
        if self.scratch_mb > disk_left:
            raise InsufficientResources(
                f"this host's disk has no room for {self.scratch_mb} MB (SCRATCH_MB): {max(0, disk_left)} of "
                f"{usage.disk_mb} MB are left beside what {usage.sandboxes} agents were given",
                details={"disk_asked_mb": self.scratch_mb, "disk_left_mb": max(0, disk_left)},
                retry_after=_RETRY_SECONDS,
            )
