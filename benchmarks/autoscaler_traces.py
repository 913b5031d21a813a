"""The loads for comparing autoscaling rules: requested sessions per second of time.

Each trace is deterministic. `quick` shortens the long ones and leaves rates of change as they are.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trace:
    """Requested sessions at each second, and the spans (start, end) without readable metrics."""

    name: str
    wanted: list[float]
    missing: list[tuple[int, int]] = field(default_factory=list)

    def readable(self, second: int) -> bool:
        """Return whether metrics are readable at this second."""
        return not any(start <= second < end for start, end in self.missing)


def _sampled(seconds: int, load: Callable[[int], float]) -> list[float]:
    return [max(0.0, load(second)) for second in range(seconds)]


def _between(second: float, points: list[tuple[float, float]]) -> float:
    """Interpolate linearly between (second, sessions) points."""
    before = points[0]
    for point in points[1:]:
        if second < point[0]:
            share = (second - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]


def ramp(quick: bool) -> Trace:
    """No user for a minute, then 10,000 users within 300 s, who stay and then leave within 300 s."""
    end = 360.0 + (1200 if quick else 3000)
    points = [(0.0, 0.0), (60.0, 0.0), (360.0, 10_000.0), (end, 10_000.0), (end + 300, 0.0)]
    return Trace("ramp of 10,000", _sampled(int(end) + 600, lambda second: _between(second, points)))


def surge(quick: bool) -> Trace:
    """2,000 sessions, then five times as many within a minute for half an hour."""
    stay = 900 if quick else 1800
    points = [(0.0, 2000.0), (900.0, 2000.0), (960.0, 10_000.0), (960.0 + stay, 10_000.0), (1020.0 + stay, 2000.0)]
    return Trace("fivefold surge", _sampled(2400 + stay, lambda second: _between(second, points)))


def day(quick: bool) -> Trace:
    """A day between 1,000 sessions at night and 10,000 in the afternoon, with 1% of jitter; `quick`: six hours."""
    jitter = random.Random(7)
    seconds = 21_600 if quick else 86_400
    walk = [0.0]
    for _ in range(seconds):
        walk.append(0.98 * walk[-1] + jitter.gauss(0, 0.002))  # correlated over about a minute, 1% wide

    def load(second: int) -> float:
        base = 5500 - 4500 * math.cos(2 * math.pi * second / 86_400)
        return base * (1 + walk[second])

    return Trace("a day", _sampled(seconds, load))


def sawtooth(quick: bool) -> Trace:
    """From 1,000 to 6,000 sessions in 25 minutes and back within 5, repeatedly."""
    teeth = 2 if quick else 6
    points = [(0.0, 1000.0), (1500.0, 6000.0), (1800.0, 1000.0)]
    return Trace("sawtooth", _sampled(1800 * teeth, lambda second: _between(second % 1800, points)))


def noise(quick: bool) -> Trace:
    """5,000 sessions with white noise of 5%, new every 5 s."""
    random_source = random.Random(11)
    seconds = 3600 if quick else 7200
    steps = [random_source.gauss(5000, 250) for _ in range(seconds // 5 + 1)]
    return Trace("noise", _sampled(seconds, lambda second: steps[second // 5]))


def missing(quick: bool) -> Trace:
    """A rise from 3,000 to 6,000 sessions in 10 minutes and a fall back, each with 2 minutes without metrics."""
    del quick
    points = [(0.0, 3000.0), (900.0, 3000.0), (1500.0, 6000.0), (2700.0, 6000.0), (3300.0, 3000.0), (4500.0, 3000.0)]
    wanted = _sampled(4500, lambda second: _between(second, points))
    return Trace("metrics missing", wanted, missing=[(1140, 1260), (2940, 3060)])


def traces(quick: bool) -> list[Trace]:
    """Return every trace."""
    return [make(quick) for make in (ramp, surge, day, sawtooth, noise, missing)]
