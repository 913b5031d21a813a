"""What this host has and what of it is free, as the host itself sees it. Blocking, a few small files of /proc."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class HostSight:
    """One look. `load` is how many processes ran or wanted to, over the last minute (proc(5), loadavg)."""

    load: float
    memory_free_mb: int
    disk_mb: int
    disk_free_mb: int


def look(folder: Path) -> HostSight:
    """Look at this host and at the disk on which `folder` is, or will be. Raises OSError."""
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return HostSight(os.getloadavg()[0], memory_free_mb(), disk.total >> 20, disk.free >> 20)


def cores() -> int:
    """Return the processors that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_mb() -> int:
    """Return the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def memory_free_mb() -> int:
    """Return what new programs can have without swapping (`MemAvailable`), 0 where the kernel does not say."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0
