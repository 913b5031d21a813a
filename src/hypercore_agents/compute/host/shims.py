"""What the shims of all backends share: keeping what an agent prints, and writing down how it ended.

Standard library only, and as little of it as possible: there is a shim beside every agent, and each holds its own copy.
"""

from __future__ import annotations

import json
import os

# Importing `typing` would cost every shim half a megabyte; type checkers take this name for true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_PIECE = 64 * 1024


class BoundedLog:
    """Two files of at most half of `limit` bytes each; the older half is dropped. What the disk refuses is lost."""

    def __init__(self, path: str, limit: int) -> None:
        # Both are open from the start: a shim may have no files later.
        self._half = max(1, limit // 2)
        self._descriptor, self._older = _open(path), _open(path + ".1")
        self._size = os.fstat(self._descriptor).st_size

    def write(self, data: bytes) -> None:
        """Add to the log."""
        while data:
            if self._size >= self._half:
                self._rotate()
            piece = data[: self._half - self._size]
            data = data[len(piece) :]
            self._size += len(piece)
            try:
                os.write(self._descriptor, piece)
            except OSError:
                return

    def _rotate(self) -> None:
        os.ftruncate(self._older, 0)
        offset = 0
        try:
            while piece := os.pread(self._descriptor, _PIECE, offset):
                offset += os.write(self._older, piece)
        except OSError:
            pass  # a full disk: the older half is lost
        os.ftruncate(self._descriptor, 0)
        self._size = 0


def _open(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


class ExitFile:
    """How it ended, written in place into a file of full size: neither a full disk nor a lost path matters."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size

    def write(self, **ending: Any) -> None:
        """Say how it ended, in one write."""
        os.pwrite(self._descriptor, json.dumps(ending).encode().ljust(self._size), 0)


def close_above(descriptor: int) -> None:
    """Close what was inherited by accident. Not `os.closerange`: without close_range(2) it tries every number."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > descriptor:
            try:
                os.close(int(name))
            except OSError:
                continue


def write_where_possible(path: str, text: str) -> None:
    """Write to a file of the kernel; leave it where there is none or it refuses."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        return


class MemoryKills:
    """Counts the processes that the kernel killed at a memory limit: memory.oom_control (v1), memory.events (v2)."""

    def __init__(self, groups: list[str]) -> None:
        self._descriptor: int | None = None
        for group in groups:
            for name in ("memory.oom_control", "memory.events"):
                try:
                    self._descriptor = os.open(os.path.join(group, name), os.O_RDONLY | os.O_CLOEXEC)
                except OSError:
                    continue

    def count(self) -> int:
        """Return how many there were; 0 where that is not known."""
        if self._descriptor is None:
            return 0
        try:
            lines = os.pread(self._descriptor, 4096, 0).decode().splitlines()
            return int(dict(line.split() for line in lines).get("oom_kill", 0))
        except (OSError, ValueError):
            return 0

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def memory_kills(groups: list[str]) -> int:
    """Return how many processes the kernel killed at the groups' memory limit."""
    kills = MemoryKills(groups)
    try:
        return kills.count()
    finally:
        kills.close()
