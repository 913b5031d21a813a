"""The disk scan: adds up sessions' files by name, where the kernel does not count them per session (`storage`).

The scan is inexact. A file that was unlinked while open, a mapping of it, and a descriptor in transit to another
process take space and have no name, so a hostile session can fill the disk beyond its limit. The scan is for hosts that
have neither loop devices nor user quotas; `/health` and `doctor` report when it is used.

The kernel bounds a single file (RLIMIT_FSIZE). For many files, a child of the launcher adds up the folders of the
sessions with processes. It does so when the file system has lost some megabytes or some thousands of inodes since the
last scan, or after a while where the file system does not count inodes. A session that is over a limit, in bytes or in
files, and grew since the last scan is killed. So a session can exceed its limit by what it writes in about a second. It
may stay over its limit while it does not grow, so that its user can tidy up. A session over twice its limit, or with
folders nested too deep to be counted, is killed at every scan.

Rejected: project quotas (few hosts enable them, and a file's owner may change its project); a file system in memory (a
session's files would count as memory).
"""

from __future__ import annotations

import json
import os
import time

from hypercore_agents.agent.launcher.workspace_files import MOST_LEVELS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

EVERY_SECONDS = 0.5
_UNCOUNTED_SECONDS = 10.0
"""Interval of scans where the file system does not report its free inodes (btrfs)."""
_MB = 1 << 20
_DEEPEST = MOST_LEVELS + 2
"""Folders within folders, including the session's own and the workspace; one descriptor each."""


class DiskScan:
    """Decides when to scan and which sessions exceed their limits. `root` is on the file system in question."""

    def __init__(self, root: str, limit_mb: int, file_limit: int) -> None:
        self._root = root
        self.byte_limit, self.file_limit = limit_mb * _MB, file_limit
        self._steps = (min(64 * _MB, self.byte_limit // 4), min(4096, file_limit // 4))
        self._free = self._free_now()
        self._next_check = 0.0
        self._scanned = time.monotonic()
        self._sizes: dict[str, list[int]] = {}

    def due(self) -> bool:
        """Return whether enough was written since the last scan. Cheap to call often."""
        now = time.monotonic()
        if now < self._next_check:
            return False
        self._next_check = now + EVERY_SECONDS
        free = self._free_now()
        lost = any(before - left >= step for before, left, step in zip(self._free, free, self._steps, strict=True))
        if not lost and (free[1] > 0 or now - self._scanned < _UNCOUNTED_SECONDS):
            self._free = (max(self._free[0], free[0]), max(self._free[1], free[1]))
            return False
        self._free, self._scanned = free, now
        return True

    def over_limit(self, sizes: Mapping[str, list[int]]) -> dict[str, str]:
        """Return the sessions to kill, with the reason. `sizes` holds [bytes, files], or [] if too deep to measure."""
        reasons: dict[str, str] = {}
        limits = (self.byte_limit, self.file_limit)
        for name, size in sizes.items():
            before = self._sizes.get(name) or [0, 0]
            if not size:
                reasons[name] = f"it nests folders deeper than {MOST_LEVELS} levels"
                continue
            for unit, limit, now, then in zip(("bytes", "files"), limits, size, before, strict=True):
                if now > 2 * limit or (now > limit and now > then):
                    reasons[name] = f"it has {now} of {limit} {unit} and grows"
        self._sizes = dict(sizes)
        return reasons

    def _free_now(self) -> tuple[int, int]:
        disk = os.statvfs(self._root)
        return disk.f_bfree * disk.f_frsize, disk.f_ffree


def measure(folders: Mapping[str, str], limits: tuple[int, int], output: int) -> None:
    """Write the bytes and files of each folder, as JSON by name, to a descriptor.

    Runs in a worker; may take long. Counting stops at twice the limits.
    """
    sizes = {name: _size(path, limits) for name, path in folders.items()}
    with os.fdopen(output, "w") as file:
        json.dump(sizes, file)


def _size(path: str, limits: tuple[int, int]) -> list[int]:
    """Return the bytes on disk and the entries below a folder, [] if it is too deep. Follows no links."""
    total = entries = 0
    open_folders: list[tuple[int, Iterator[os.DirEntry[str]]]] = []

    def enter(name: str, parent: int | None) -> None:
        try:
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except OSError:
            return  # deleted, or no longer a folder
        open_folders.append((folder, os.scandir(folder)))

    try:
        enter(path, None)
        while open_folders:
            folder, left = open_folders[-1]
            entry = next(left, None)
            if entry is None:
                os.close(open_folders.pop()[0])
                continue
            entries += 1
            try:
                total += os.stat(entry.name, dir_fd=folder, follow_symlinks=False).st_blocks * 512
                is_folder = entry.is_dir(follow_symlinks=False)
            except OSError:
                continue
            if total > 2 * limits[0] or entries > 2 * limits[1]:
                break
            if is_folder and len(open_folders) >= _DEEPEST:
                return []
            if is_folder:
                enter(entry.name, folder)
    finally:
        for folder, _ in open_folders:
            os.close(folder)
    return [total, entries]
