"""The scan: sessions' files added up by name, where the kernel does not count them per session (`storage`).

It is inexact. A file that was unlinked while it is open, a mapping of it and a descriptor on its way to another process
take space and have no name, so a hostile session can fill the disk past its limit. It stays for hosts that have neither
loop devices nor user quotas; `/health` and `doctor` say when it is used.

One file is bounded by the kernel (RLIMIT_FSIZE). For many files: when the file system has lost some megabytes or some
thousands of its inodes since the last look (or a while has passed, where it does not count inodes), a child of the
launcher adds up the folders of the sessions that run something. One that is over a limit, in bytes or in files, and
grew since the last look is killed. So a session can be over its limit by what it writes in about a second, and may
live on over it while it does not grow: its user can still tidy up. A session over twice its limit, or with folders
nested too deep to be counted, is killed at every look.

Rejected: project quotas (few hosts have them switched on, and a file's owner may change its project); a file system in
memory (a session's files would be memory).
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
"""How often to look anyway where the file system does not say how many inodes are free (btrfs)."""
_MB = 1 << 20
_DEEPEST = MOST_LEVELS + 2
"""Folders within folders, the session's own and the workspace first; one descriptor each."""


class DiskWatch:
    """Says when to look, and whose folder is too large. `root` is on the file system in question."""

    def __init__(self, root: str, limit_mb: int, limit_files: int) -> None:
        self._root = root
        self.bytes, self.files = limit_mb * _MB, limit_files
        self._steps = (min(64 * _MB, self.bytes // 4), min(4096, limit_files // 4))
        self._free = self._free_now()
        self._next = 0.0
        self._looked = time.monotonic()
        self._sizes: dict[str, list[int]] = {}

    def due(self) -> bool:
        """Say whether enough was written since the last look; asked often, answers seldom."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + EVERY_SECONDS
        free = self._free_now()
        lost = any(before - left >= step for before, left, step in zip(self._free, free, self._steps, strict=True))
        if not lost and (free[1] > 0 or now - self._looked < _UNCOUNTED_SECONDS):
            self._free = (max(self._free[0], free[0]), max(self._free[1], free[1]))
            return False
        self._free, self._looked = free, now
        return True

    def too_large(self, sizes: Mapping[str, list[int]]) -> dict[str, str]:
        """Return the sessions that must end and why, from what was measured: [bytes, files], or nothing of one that
        cannot be measured."""
        found: dict[str, str] = {}
        for name, size in sizes.items():
            before = self._sizes.get(name) or [0, 0]
            if not size:
                found[name] = f"nests folders deeper than {MOST_LEVELS} levels"
                continue
            for what, limit, now, then in zip(("bytes", "files"), (self.bytes, self.files), size, before, strict=True):
                if now > 2 * limit or (now > limit and now > then):
                    found[name] = f"has {now} {what} of {limit} and grows"
        self._sizes = dict(sizes)
        return found

    def _free_now(self) -> tuple[int, int]:
        seen = os.statvfs(self._root)
        return seen.f_bfree * seen.f_frsize, seen.f_ffree


def measure(folders: Mapping[str, str], most: tuple[int, int], answer: int) -> None:
    """Write the bytes and files of each folder, as JSON by name, to a descriptor. For a child of the launcher: may
    take long. Counting ends at twice of `most`."""
    sizes = {name: _size(path, most) for name, path in folders.items()}
    with os.fdopen(answer, "w") as file:
        json.dump(sizes, file)


def _size(path: str, most: tuple[int, int]) -> list[int]:
    """Return the bytes on disk and the entries below a folder, nothing when it is too deep; no link is followed."""
    total = entries = 0
    open_folders: list[tuple[int, Iterator[os.DirEntry[str]]]] = []

    def enter(name: str, parent: int | None) -> None:
        try:
            here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except OSError:
            return  # it has gone, or is no folder any more
        open_folders.append((here, os.scandir(here)))

    try:
        enter(path, None)
        while open_folders:
            here, left = open_folders[-1]
            entry = next(left, None)
            if entry is None:
                os.close(open_folders.pop()[0])
                continue
            entries += 1
            try:
                total += os.stat(entry.name, dir_fd=here, follow_symlinks=False).st_blocks * 512
                deeper = entry.is_dir(follow_symlinks=False)
            except OSError:
                continue
            if total > 2 * most[0] or entries > 2 * most[1]:
                break
            if deeper and len(open_folders) >= _DEEPEST:
                return []
            if deeper:
                enter(entry.name, here)
    finally:
        for here, _ in open_folders:
            os.close(here)
    return [total, entries]
