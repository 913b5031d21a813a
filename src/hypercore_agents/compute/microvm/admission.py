"""What this backend refuses to start: what no VM can have, and what does not fit on this host now.

Memory is given once: what VMs have, and QEMU beside them, and templates, must fit in the host's memory less a reserve.
Processors are shared: VMs together may have `cpu_overcommit` times as many cores as the host. A VM counts from before
its start until it is removed, ended ones too, because their records are what is counted.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from hypercore_agents.api.ids import AGENT_ID_PATTERN
from hypercore_agents.compute.base import HostUsage, NoRoom, SandboxRefused, SandboxRequest
from hypercore_agents.compute.microvm.records import Record
from hypercore_agents.compute.microvm.sizes import SizeClass, size_class

_AGENT_ID = re.compile(AGENT_ID_PATTERN)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_BYTES = 1024
_ENVIRONMENT_BYTES = 32 * 1024
_RESERVED_SHARE, _RESERVED_MOST_MB = 0.1, 4096
_RETRY_SECONDS = 10.0
RESERVED_NAMES = frozenset(
    {"AGENT_ID", "GATEWAY_URL", "AGENT_STATE_DIR", "AGENT_HOST", "AGENT_PORT", "AGENT_LISTEN_FD", "ENROLMENT_FD"}
)
"""Variables that the guest sets; a request cannot."""


def is_agent_id(value: str) -> bool:
    """Say whether this can be the id of an agent; only then it may become a part of a path."""
    return _AGENT_ID.fullmatch(value) is not None


def check(request: SandboxRequest) -> SizeClass:
    """Return the request's size class. Raises SandboxRefused for what can never be started by this backend."""

    def refuse(field: str, why: str) -> NoReturn:
        raise SandboxRefused(f"{field}: {why}", field=field)

    if not is_agent_id(request.agent_id):
        refuse("agent_id", f"must match {AGENT_ID_PATTERN}")
    if request.gpu_quota_mb:
        refuse("gpu_quota", "the microvm backend gives no GPU to its virtual machines; leave it out or give 0")
    if request.image is not None:
        refuse("image", "the microvm backend boots the newest of `hypercore-agents image build`; leave it out")
    if request.cores < 1:
        refuse("cores", "must be at least 1")
    if not 1 <= len(request.enrolment_secret.encode()) <= _SECRET_BYTES:
        refuse("enrolment_secret", f"must be 1 to {_SECRET_BYTES} bytes")
    for name, value in request.environment.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            refuse("environment", f"{name!r} is no variable: letters, digits and _, and no NUL in its value")
        if name in RESERVED_NAMES:
            refuse("environment", f"{name} is set by the backend; remove it")
    if sum(len(json.dumps([name, value])) for name, value in request.environment.items()) > _ENVIRONMENT_BYTES:
        refuse("environment", f"must be at most {_ENVIRONMENT_BYTES} bytes in all")
    return size_class(request.cores, request.memory_mb)


@dataclass(frozen=True)
class HostRoom:
    """What this host has for VMs. `overhead_mb` is what each takes beside its memory."""

    cores: int
    memory_mb: int
    cpu_overcommit: float
    overhead_mb: int

    @property
    def most_cores(self) -> int:
        """Cores that VMs may have together."""
        return int(self.cores * self.cpu_overcommit)

    @property
    def most_memory_mb(self) -> int:
        """Memory that VMs and templates may have together."""
        return self.memory_mb - min(int(self.memory_mb * _RESERVED_SHARE), _RESERVED_MOST_MB)

    def usage(self, records: Iterable[Record], templates_mb: int) -> HostUsage:
        """Return what is taken."""
        taken = [record for record in records if record.memory_mb]
        return HostUsage(
            cores=self.most_cores,
            cores_used=sum(record.cores for record in taken),
            memory_mb=self.most_memory_mb,
            memory_used_mb=templates_mb + sum(record.memory_mb + self.overhead_mb for record in taken),
            sandboxes=len(taken),
        )

    def admit(self, cores: int, size: SizeClass, usage: HostUsage) -> None:
        """Raise SandboxRefused when this host is too small for the VM, NoRoom when too much is taken now."""
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
            raise NoRoom(
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
