"""Progress of a starting CLI, measured by the processor time and page reads of the process and its descendants.

A start on a busy host takes long, and killing it makes the next one take as long. So a start is given up only when
none of its processes advances for a whole window, or when it has used many times the processor time of any successful
start. Rejected: a limit on wall time alone, since an overloaded host would kill every start near its end and begin it
again.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_TICK = os.sysconf("SC_CLK_TCK")
_MOST_WINDOWS = 4
"""A start that has used this many windows of processor time is in a loop."""
_LONGEST_WINDOWS = 20
_LEAST_SHARE = 0.01
"""Share of a processor below which a process only waits."""
_DEEPEST = 8


class Activity(NamedTuple):
    """What processes have used: processor time in seconds, and pages read from disk."""

    cpu: float
    page_reads: int


def activity_of(pid: int) -> Activity | None:
    """Return the activity of a process and its descendants, None after its end (proc(5), stat fields 12 to 17)."""
    cpu, reads, level, alive = 0.0, 0, [pid], False
    for _ in range(_DEEPEST):
        children: list[int] = []
        for member in level:
            try:
                fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
                cpu += sum(map(int, fields[11:15])) / _TICK
                reads += int(fields[9])
                children += map(int, Path(f"/proc/{member}/task/{member}/children").read_text().split())
                alive = True
            except (OSError, ValueError, IndexError, UnicodeDecodeError):
                continue
        level = children
    return Activity(cpu, reads) if alive else None


class StartProgress:
    """Judges one start. `window`: seconds without progress after which it is given up; `clock` returns seconds."""

    def __init__(self, window: float, clock: Callable[[], float]) -> None:
        self.window = window
        self.activity = Activity(0.0, 0)
        self._clock = clock
        self._began = self._since = clock()
        self._base = self.activity

    def update(self, activity: Activity | None) -> str | None:
        """Record the start's activity (None: not known yet); return the reason to give it up, or None."""
        now = self._clock()
        if activity is None:
            self._since = now
        else:
            self.activity = activity
            gained = activity.cpu - self._base.cpu >= _LEAST_SHARE * self.window
            if gained or activity.page_reads != self._base.page_reads:
                self._base, self._since = activity, now
        if now - self._since >= self.window:
            return f"it made no progress for {self.window:g} s (CLI_START_TIMEOUT)"
        if self.activity.cpu >= _MOST_WINDOWS * self.window:
            return f"it used {self.activity.cpu:.0f} s of processor time without an answer"
        if now - self._began >= _LONGEST_WINDOWS * self.window:
            return f"it did not answer within {now - self._began:.0f} s"
        return None

    @property
    def share(self) -> float:
        """The share of one processor that the start has had."""
        elapsed = self._clock() - self._began
        return self.activity.cpu / elapsed if elapsed > 0 else 1.0
