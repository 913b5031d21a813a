"""Bounded lines over descriptors that may be gone for a while: the control port's two directions. Stdlib only."""

import contextlib
import os

from hypercore_agents.api.guest import LONGEST_LINE


class LineReader:
    """Cuts what a descriptor yields into lines; one that is too long is dropped whole."""

    def __init__(self) -> None:
        self._kept = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes, without their ends. A line too long comes out empty."""
        lines: list[bytes] = []
        while data:
            part, end, data = data.partition(b"\n")
            if not self._skipping:
                self._kept += part
                if len(self._kept) > LONGEST_LINE:
                    self._kept, self._skipping = b"", True
            if end:
                lines.append(self._kept)
                self._kept, self._skipping = b"", False
        return lines


class Outlet:
    """Writes to a port as much as it takes, keeps a little and drops the rest: a slow host never stops the guest."""

    def __init__(self, descriptor: int, limit: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.dropped = 0
        self._limit = limit
        self._waiting = bytearray()

    @property
    def pending(self) -> bool:
        """Say whether something waits for the port."""
        return bool(self._waiting)

    def write(self, data: bytes) -> None:
        """Send or keep `data`; drop it, counted, when too much waits already."""
        if len(self._waiting) + len(data) > self._limit:
            self.dropped += len(data)
            return
        self._waiting += data
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the port takes it."""
        with contextlib.suppress(OSError):  # full, or nobody at the other end: it waits
            while self._waiting:
                written = os.write(self.descriptor, self._waiting)
                del self._waiting[:written]
