"""Estimates from measurements: how many CLI starts may run at a time, and how long a waiter will wait.

`Pace` grows by a fraction and shrinks by a factor (AIMD), by the share of a processor that each start got.
`ServiceTime` converts durations into the interval at which waiters are served (Little's law), and that into a waiter's
expected wait.
"""

_SMOOTHING = 0.3
_LEAST_SHARE, _GOOD_SHARE = 0.25, 0.45
"""Shares of one processor. Alone on a machine, a start gets more than half of one; the rest of its time it waits."""
_SHRINK, _GROW = 0.7, 0.25


class Pace:
    """How many starts may run at a time: from 1 to `most`."""

    def __init__(self, most: int) -> None:
        self.most = max(1, most)
        self._width = float(self.most)

    @property
    def limit(self) -> int:
        """How many starts may run now."""
        return max(1, int(self._width))

    def record_start(self, share: float) -> None:
        """Adapt to a start that got this share of a processor while it ran."""
        if share < _LEAST_SHARE:
            self._width = max(1.0, self._width * _SHRINK)
        elif share > _GOOD_SHARE:
            self._width = min(float(self.most), self._width + _GROW)


class ServiceTime:
    """The measured duration of one kind of work, smoothed. Seconds."""

    def __init__(self) -> None:
        self.duration: float | None = None

    def record(self, seconds: float) -> None:
        """Record one duration."""
        before = self.duration
        self.duration = seconds if before is None else before + _SMOOTHING * (seconds - before)

    def wait(self, ahead: int, at_once: int) -> float:
        """Return the expected wait behind `ahead` others, of which `at_once` are served at a time."""
        return (ahead / max(1, at_once)) * (self.duration or 0.0)
