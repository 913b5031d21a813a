"""What a VM printed, bounded: its console, and what QEMU itself says. Standard library only: the shim imports it."""

from __future__ import annotations

import os


class BoundedLog:
    """Two files of at most half of `limit` bytes each; the older half is dropped. What the disk refuses is lost."""

    def __init__(self, path: str, limit: int) -> None:
        self._path = path
        self._half = max(1, limit // 2)
        self._descriptor = self._open()
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
        try:
            os.replace(self._path, self._path + ".1")
            fresh = self._open()
            os.close(self._descriptor)
            self._descriptor = fresh
        except OSError:
            os.ftruncate(self._descriptor, 0)
        self._size = 0

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
