"""The code that the shims of all backends share: the bounded log of an agent's output, and its exit file.

Uses the standard library only, and as little of it as possible: a shim runs beside every agent, with its own copy.
"""

from __future__ import annotations

import json
import os

# Importing `typing` would cost every shim half a megabyte; type checkers treat this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_PIECE = 64 * 1024


class BoundedLog:
    """Two files of at most `limit`/2 bytes each; the older one is dropped. Output that the disk rejects is lost."""

    def __init__(self, path: str, limit: int) -> None:
        # Both are opened at the start: a shim may later have no access to files.
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
            pass  # The disk is full: the older half is lost.
        os.ftruncate(self._descriptor, 0)
        self._size = 0


def _open(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


class ExitFile:
    """The exit file, written in place at its full size, so neither a full disk nor a removed path can prevent it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size

    def write(self, **ending: Any) -> None:
        """Record how the process ended, in one write."""
        os.pwrite(self._descriptor, json.dumps(ending).encode().ljust(self._size), 0)


def close_above(descriptor: int) -> None:
    """Close inherited descriptors. Not by `os.closerange`, which without close_range(2) tries every number."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > descriptor:
            try:
                os.close(int(name))
            except OSError:
                continue


def write_where_possible(path: str, text: str) -> None:
    """Write to a file of the kernel; do nothing if it does not exist or rejects the write."""
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
        """Return the number of kills, 0 if it is unknown."""
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
    """Return the number of processes that the kernel killed at the groups' memory limit."""
    kills = MemoryKills(groups)
    try:
        return kills.count()
    finally:
        kills.close()
