"""Recent history of the load: its trend, its noise, and gaps in its samples.

Pure functions of samples in chronological order. The noise is measured on the samples before those of the trend, so a
higher newest sample never yields a flatter trend. The monotonicity of the policy depends on this.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TREND_SAMPLES = 3
"""Minimum number of samples for a trend."""
_NOISE_WIDTHS = 3.0
"""Only the part of a slope above this many standard errors counts as trend."""
_SECOND_DIFFERENCE_SPREAD = 0.6745 * math.sqrt(6)
"""Median absolute second difference of independent normal noise, in its standard deviations."""


@dataclass(frozen=True)
class Sample:
    """One stored observation: Unix time, sessions, smoothed sessions, and whether the pool was full."""

    at: float
    load: float
    level: float
    full: bool


def since_full(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return the samples after the last full one, the newest excepted: returning refused load is not a trend."""
    for index in range(len(samples) - 2, -1, -1):
        if samples[index].full:
            return samples[index + 1 :]
    return samples


def trend(samples: Sequence[Sample], window: float, now: float) -> float:
    """Return the growth in sessions per second that noise cannot explain (least squares; at least 0)."""
    count = max(LEAST_TREND_SAMPLES, sum(sample.at > now - window for sample in samples))
    recent, older = samples[-count:], samples[:-count]
    times = [sample.at - now for sample in recent]
    mean = statistics.fmean(times)
    spread = sum((time - mean) ** 2 for time in times)
    if spread <= 0:
        return 0.0
    slope = sum((time - mean) * sample.load for time, sample in zip(times, recent, strict=True)) / spread
    return max(0.0, slope - _NOISE_WIDTHS * _noise(older) / math.sqrt(spread))


def _noise(samples: Sequence[Sample]) -> float:
    """Return the standard deviation of the samples around their trend; robust against a few jumps."""
    loads = [sample.load for sample in samples[-60:]]
    second_differences = [abs(a - 2 * b + c) for a, b, c in zip(loads, loads[1:], loads[2:], strict=False)]
    return statistics.median(second_differences) / _SECOND_DIFFERENCE_SPREAD if second_differences else 0.0


def gapless(samples: Sequence[Sample], longest_gap: float) -> Sequence[Sample]:
    """Return the newest samples without a gap of more than `longest_gap` seconds between them."""
    for index in range(len(samples) - 1, 0, -1):
        if samples[index].at - samples[index - 1].at > longest_gap:
            return samples[index:]
    return samples
