"""Decides which requests this backend refuses, and which VMs fit on this host now.

Memory is not overcommitted: the VMs with QEMU's overhead and the templates must fit into the host's memory minus a
reserve. Disks are sparse but counted in full: the space that a VM has not used yet must still fit, or its writes would
fail later, and the manager's with them. Processors are shared: all VMs together may have `cpu_overcommit` times the
cores of the host. A VM counts from before its start until it is removed, also after it has ended, because records are
counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hypercore_agents.compute.base import HostUsage, InsufficientResources, SandboxRefused, SandboxRequest
from hypercore_agents.compute.host import request_checks
from hypercore_agents.compute.host.capacity import HostSnapshot
from hypercore_agents.compute.host.request_checks import refuse
from hypercore_agents.compute.microvm.records import VmRecord
from hypercore_agents.compute.microvm.sizes import SizeClass, size_class

_ENVIRONMENT_BYTES = 32 * 1024
_RESERVED_SHARE, _MAX_RESERVED_MB = 0.1, 4096
_RESERVED_DISK_SHARE, _MAX_RESERVED_DISK_MB = 0.05, 2048
_RETRY_SECONDS = 10.0
RESERVED_NAMES = frozenset(
    {"AGENT_ID", "GATEWAY_URL", "AGENT_STATE_DIR", "AGENT_HOST", "AGENT_PORT", "AGENT_LISTEN_FD", "ENROLMENT_FD"}
)
"""Variables that the guest sets; a request cannot."""


def check(request: SandboxRequest) -> SizeClass:
    """Return the request's size class. Raises SandboxRefused for a request that this backend can never start."""
    if request.gpu_quota_mb:
        refuse("gpu_quota", "the microvm backend has no GPUs; omit it or set it to 0")
    if request.image is not None:
        refuse("image", "the microvm backend boots the newest image of `hypercore-agents image build`; omit it")
    request_checks.check(request, reserved_names=RESERVED_NAMES, environment_bytes=_ENVIRONMENT_BYTES)
    return size_class(request.cores, request.memory_mb)


@dataclass(frozen=True)
class HostResources:
    """The resources of this host for VMs. Each VM takes `overhead_mb` besides its memory, and `scratch_mb` of disk."""

    cores: int
    memory_mb: int
    cpu_overcommit: float
    overhead_mb: int
    scratch_mb: int

    @property
    def max_cores(self) -> int:
        """The cores that all VMs may have together."""
        return int(self.cores * self.cpu_overcommit)

    @property
    def max_memory_mb(self) -> int:
        """The memory that all VMs and templates may have together."""
        return self.memory_mb - min(int(self.memory_mb * _RESERVED_SHARE), _MAX_RESERVED_MB)

    def usage(self, records: Iterable[VmRecord], templates_mb: int, allocated_mb: int, host: HostSnapshot) -> HostUsage:
        """Return the usage. `allocated_mb` is the space that the VMs' sparse disks take on the host already."""
        counted = [record for record in records if record.memory_mb]
        reserved_mb = min(int(host.disk_mb * _RESERVED_DISK_SHARE), _MAX_RESERVED_DISK_MB)
        return HostUsage(
            cores=self.max_cores,
            cores_used=sum(record.cores for record in counted),
            memory_mb=self.max_memory_mb,
            memory_used_mb=templates_mb + sum(record.memory_mb + self.overhead_mb for record in counted),
            sandboxes=len(counted),
            disk_mb=max(0, host.disk_free_mb + allocated_mb - reserved_mb),
            disk_used_mb=sum(record.disk_mb for record in counted),
            load=host.load,
            memory_free_mb=host.memory_free_mb,
            disk_free_mb=host.disk_free_mb,
        )

    def admit(self, cores: int, size: SizeClass, usage: HostUsage) -> None:
        """Raise SandboxRefused if this host is too small for the VM, InsufficientResources if it is too busy now."""
        needed_mb = size.memory_mb + self.overhead_mb
        if cores > self.max_cores:
            raise SandboxRefused(
                f"cores: this host has {self.cores}, so agents may have {self.max_cores} together "
                f"(CPU_OVERCOMMIT={self.cpu_overcommit:g}); {cores} were requested",
                field="cores",
            )
        if needed_mb > self.max_memory_mb:
            raise SandboxRefused(
                f"memory: this host has {self.max_memory_mb} MB for agents; a virtual machine of this size takes "
                f"{needed_mb} MB",
                field="memory",
            )
        cores_left, memory_left = usage.cores - usage.cores_used, usage.memory_mb - usage.memory_used_mb
        if cores > cores_left or needed_mb > memory_left:
            raise InsufficientResources(
                f"this host cannot hold {cores} more cores and {needed_mb} MB: {cores_left} of {usage.cores} cores and "
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
                f"the disk of this host cannot hold {self.scratch_mb} MB more (SCRATCH_MB): {max(0, disk_left)} of "
                f"{usage.disk_mb} MB are left beside the disks of {usage.sandboxes} agents",
                details={"disk_asked_mb": self.scratch_mb, "disk_left_mb": max(0, disk_left)},
                retry_after=_RETRY_SECONDS,
            )
