"""How fast work is served and how many starts of a Claude CLI run at a time: estimates from what was measured.

`Pace` widens by a fraction and narrows by a factor (AIMD), by the share of a processor that each start got. `Service`
turns durations into the interval at which waiters are served (Little's law), and so into a waiter's expected wait.
"""

_SMOOTHING = 0.3
_LEAST_SHARE, _GOOD_SHARE = 0.25, 0.45
"""Of one processor. Alone on a machine a start gets more than half of one; the rest of its time it waits."""
_NARROWER, _WIDER = 0.7, 0.25


class Pace:
    """The number of starts that may run at a time: from 1 to `most`."""

    def __init__(self, most: int) -> None:
        self.most = max(1, most)
        self._width = float(self.most)

    @property
    def limit(self) -> int:
        """How many may run now."""
        return max(1, int(self._width))

    def finished(self, share: float) -> None:
        """Adapt to a start that got this share of a processor while it ran."""
        if share < _LEAST_SHARE:
            self._width = max(1.0, self._width * _NARROWER)
        elif share > _GOOD_SHARE:
            self._width = min(float(self.most), self._width + _WIDER)


class Service:
    """The measured duration of one kind of work, smoothed. Seconds."""

    def __init__(self) -> None:
        self.duration: float | None = None

    def took(self, seconds: float) -> None:
        """Note a duration."""
        before = self.duration
        self.duration = seconds if before is None else before + _SMOOTHING * (seconds - before)

    def wait(self, ahead: int, at_once: int) -> float:
        """Return the expected wait of one with so many before it, where `at_once` are served at a time."""
        return (ahead / max(1, at_once)) * (self.duration or 0.0)
