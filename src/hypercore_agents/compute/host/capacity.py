"""The resources of this host and how much of them is free, by the host's own figures. Blocks briefly (/proc)."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class HostSnapshot:
    """Figures of one moment. `load` is the average number of runnable processes in the last minute (proc(5))."""

    load: float
    memory_free_mb: int
    disk_mb: int
    disk_free_mb: int


def snapshot(folder: Path) -> HostSnapshot:
    """Return the figures of this host, and of the disk that holds or will hold `folder`. Raises OSError."""
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return HostSnapshot(os.getloadavg()[0], memory_free_mb(), disk.total >> 20, disk.free >> 20)


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_mb() -> int:
    """Return the host's memory, in MB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def memory_free_mb() -> int:
    """Return the memory for new programs without swapping (`MemAvailable`), in MB; 0 if it is unknown."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0
