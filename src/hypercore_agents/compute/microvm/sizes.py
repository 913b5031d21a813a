"""The size classes of VMs, as pure functions.

A snapshot fits only one size, so there are just eight, and a request gets the smallest that can hold it. The VM has the
rounded-up size; its control group limits its CPU time to the requested cores.
"""

from dataclasses import dataclass

from hypercore_agents.compute.base import SandboxRefused


@dataclass(frozen=True)
class SizeClass:
    """Virtual CPUs and memory of a VM."""

    cores: int
    memory_mb: int


SIZE_CLASSES = (
    SizeClass(1, 512),
    SizeClass(2, 1024),
    SizeClass(2, 2048),
    SizeClass(4, 4096),
    SizeClass(4, 8192),
    SizeClass(8, 16384),
    SizeClass(16, 32768),
    SizeClass(32, 65536),
)
"""All size classes, smallest first. Each can hold the ones before it."""


def size_class(cores: int, memory_mb: int) -> SizeClass:
    """Return the smallest class that can hold the request. Raises SandboxRefused if it is too small or too large."""
    smallest, largest = SIZE_CLASSES[0], SIZE_CLASSES[-1]
    if memory_mb < smallest.memory_mb:
        raise SandboxRefused(
            f"memory: a virtual machine needs at least {smallest.memory_mb} MB; {memory_mb} were requested",
            field="memory",
        )
    for size in SIZE_CLASSES:
        if cores <= size.cores and memory_mb <= size.memory_mb:
            return size
    field = "cores" if cores > largest.cores else "memory"
    raise SandboxRefused(
        f"{field}: a virtual machine has at most {largest.cores} cores and {largest.memory_mb} MB", field=field
    )
