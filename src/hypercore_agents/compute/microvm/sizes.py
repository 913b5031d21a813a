"""Size classes of VMs. A snapshot fits one size only, so requests are rounded up to one of eight. Pure."""

from hypercore_agents.compute.base import SandboxRefused

MEMORY_CLASSES_MB = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""Memory that a VM can have."""

SMALLEST_MB, LARGEST_MB = MEMORY_CLASSES_MB[0], MEMORY_CLASSES_MB[-1]


def memory_class(memory_mb: int) -> int:
    """Return the smallest class that holds `memory_mb`. Raises SandboxRefused under the smallest, over the largest."""
    if memory_mb < SMALLEST_MB:
        raise SandboxRefused(
            f"memory: a virtual machine needs at least {SMALLEST_MB} MB, {memory_mb} were asked for", field="memory"
        )
    for size in MEMORY_CLASSES_MB:
        if memory_mb <= size:
            return size
    raise SandboxRefused(f"memory: a virtual machine has at most {LARGEST_MB} MB", field="memory")
