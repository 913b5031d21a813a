"""Reads lines from, and writes to, virtio-serial ports with bounded memory, also while the host is disconnected.

Standard library only: pid 1 imports this.
"""

import contextlib
import os

from hypercore_agents.api.guest import LONGEST_LINE


class LineReader:
    """Splits the data of a descriptor into lines; drops a line that is too long as a whole."""

    def __init__(self) -> None:
        self._partial = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes, without line ends. A line that is too long is returned empty."""
        lines: list[bytes] = []
        while data:
            part, end, data = data.partition(b"\n")
            if not self._skipping:
                self._partial += part
                if len(self._partial) > LONGEST_LINE:
                    self._partial, self._skipping = b"", True
            if end:
                lines.append(self._partial)
                self._partial, self._skipping = b"", False
        return lines


class BoundedWriter:
    """Writes to a port without blocking: buffers at most `limit` bytes and drops the rest, so a slow host never stops
    the guest."""

    def __init__(self, descriptor: int, limit: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.dropped = 0
        self._limit = limit
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """Whether the buffer holds data."""
        return bool(self._buffer)

    def write(self, data: bytes) -> None:
        """Send or buffer `data`; drop and count it if the buffer would exceed its limit."""
        if len(self._buffer) + len(data) > self._limit:
            self.dropped += len(data)
            return
        self._buffer += data
        self.flush()

    def flush(self) -> None:
        """Send as much of the buffer as the port takes."""
        with contextlib.suppress(OSError):  # the port is full or the host is disconnected
            while self._buffer:
                written = os.write(self.descriptor, self._buffer)
                del self._buffer[:written]
