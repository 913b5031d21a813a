"""Size classes of VMs. Pure.

A snapshot fits one size only, so there are at most eight, and a request gets the smallest that holds it. What is
rounded up is what the VM has; the CPU time that it may use is what was asked for, by its control group.
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
"""All of them, smallest first; each holds the ones before it."""


def size_class(cores: int, memory_mb: int) -> SizeClass:
    """Return the smallest class that holds the request. Raises SandboxRefused when it is under or over all of them."""
    smallest, largest = SIZE_CLASSES[0], SIZE_CLASSES[-1]
    if memory_mb < smallest.memory_mb:
        raise SandboxRefused(
            f"memory: a virtual machine needs at least {smallest.memory_mb} MB; {memory_mb} were asked for",
            field="memory",
        )
    for size in SIZE_CLASSES:
        if cores <= size.cores and memory_mb <= size.memory_mb:
            return size
    field = "cores" if cores > largest.cores else "memory"
    raise SandboxRefused(
        f"{field}: a virtual machine has at most {largest.cores} cores and {largest.memory_mb} MB", field=field
    )
