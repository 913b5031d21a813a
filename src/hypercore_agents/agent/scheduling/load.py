"""The load of this agent: the CPU that it and its CLIs use, and how long turns wait."""

import os
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_WINDOW_SECONDS = 60.0
_MOST_WAITS = 5000


class CpuMeter:
    """Measures the share of `cores` that this process, its CLIs and their children used since the last measurement.

    A child's time is added to its parent's when the child is reaped (proc(5), cutime), so no time is lost when a CLI
    ends. Only processes that run right now below a CLI's children are missed.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._used: float | None = None
        self._at = 0.0

    def share(self, pids: Iterable[int]) -> float | None:
        """Return the share, 0 to 1; None at the first call."""
        now, used = time.monotonic(), sum(os.times()[:4]) + sum(map(_seconds_of, pids))
        before, elapsed = self._used, now - self._at
        self._used, self._at = used, now
        if before is None or elapsed <= 0:
            return None
        return min(1.0, max(0.0, (used - before) / elapsed / self._cores))


class QueueWaits:
    """The waits of the last minute. Seconds."""

    def __init__(self) -> None:
        self._waits: deque[tuple[float, float]] = deque(maxlen=_MOST_WAITS)

    def add(self, seconds: float) -> None:
        """Record one wait."""
        self._waits.append((time.monotonic(), seconds))

    def percentile(self, share: float = 0.95) -> float | None:
        """Return the wait that this share of the waits does not exceed; None when there were none."""
        oldest = time.monotonic() - _WINDOW_SECONDS
        while self._waits and self._waits[0][0] < oldest:
            self._waits.popleft()
        waits = sorted(seconds for _, seconds in self._waits)
        return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else None


def _seconds_of(pid: int) -> float:
    """Return the CPU seconds of a process and its reaped children (proc(5), fields 14 to 17); 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return 0.0
    return sum(map(int, fields[11:15])) / _TICK
