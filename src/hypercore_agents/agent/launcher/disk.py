"""What sessions put on the disk, where no quota of the file system's bounds it: measured, and stopped when it grows.

One file is bounded by the kernel (RLIMIT_FSIZE). For many files: when the file system has lost some megabytes since the
last look, a child of the launcher adds up the folders of the sessions that run something; one that is over its limit
and grew since the last look is killed. So a session can be over its limit by what it writes in about a second, and may
live on over it while it does not grow: its user can still tidy up.

Rejected: project quotas (few hosts have them switched on); a file system image per session (loop devices are scarce,
and a container has none); a file system in memory (a session's files would be memory).
"""

from __future__ import annotations

import json
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

EVERY_SECONDS = 0.5
_MB = 1 << 20
_MOST_FILES = 200_000


class DiskWatch:
    """Says when to look, and whose folder is too large. `root` is on the file system in question."""

    def __init__(self, root: str, limit_mb: int) -> None:
        self._root = root
        self._limit = limit_mb * _MB
        self._step = min(64 * _MB, self._limit // 4)
        self._free = self._free_now()
        self._next = 0.0
        self._sizes: dict[str, int] = {}

    def due(self) -> bool:
        """Say whether enough was written since the last look; asked often, answers seldom."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + EVERY_SECONDS
        free = self._free_now()
        if self._free - free < self._step:
            self._free = max(self._free, free)
            return False
        self._free = free
        return True

    def too_large(self, sizes: Mapping[str, int]) -> list[str]:
        """Return the sessions that must end, from what was measured."""
        found = [name for name, size in sizes.items() if size > self._limit and size > self._sizes.get(name, 0)]
        self._sizes = dict(sizes)
        return found

    def _free_now(self) -> int:
        seen = os.statvfs(self._root)
        return seen.f_bfree * seen.f_frsize


def measure(folders: Mapping[str, str], answer: int) -> None:
    """Write the size of each folder, as JSON by name, to a descriptor. For a child of the launcher: may take long."""
    sizes = {name: _size(path) for name, path in folders.items()}
    with os.fdopen(answer, "w") as file:
        json.dump(sizes, file)


def _size(path: str) -> int:
    """Return the bytes on disk below a folder; no link is followed. Counting ends where nobody counts any more."""
    total = files = 0
    for _, _, names, here in os.fwalk(path, onerror=None, follow_symlinks=False):
        for name in names:
            try:
                total += os.stat(name, dir_fd=here, follow_symlinks=False).st_blocks * 512
            except OSError:
                continue
        files += len(names)
        if files > _MOST_FILES:
            break
    return total
