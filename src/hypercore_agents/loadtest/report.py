"""The result of a load test: counts, and histograms of waiting times with three significant digits (HDR)."""

from collections import Counter
from typing import Any

from hdrh.histogram import HdrHistogram

_LONGEST_US = 2 * 3600 * 1_000_000
_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


class WaitTimes:
    """A histogram of waiting times."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, _LONGEST_US, 3)

    def add(self, seconds: float) -> None:
        """Add one waiting time."""
        self._histogram.record_value(min(_LONGEST_US, max(1, round(seconds * 1_000_000))))

    def at(self, percentile: float) -> float:
        """Return a percentile of the waiting times in ms; 0 without any."""
        return float(self._histogram.get_value_at_percentile(percentile)) / 1000 if self.count else 0.0

    @property
    def count(self) -> int:
        """The number of waiting times."""
        return int(self._histogram.total_count)

    def summary(self) -> dict[str, float]:
        """Return count, mean, percentiles and maximum, in ms."""
        named = {f"p{percentile:g}".replace(".", "_"): round(self.at(percentile), 3) for percentile in _PERCENTILES}
        mean = float(self._histogram.get_mean_value()) / 1000 if self.count else 0.0
        return {"count": self.count, "mean": round(mean, 3), **named, "max": round(self.at(100.0), 3)}


class Report:
    """The counts of one run, updated while it runs."""

    def __init__(self, planned: int) -> None:
        self.planned = planned
        self.succeeded = 0
        self.errors: Counter[str] = Counter()
        self.turns = WaitTimes()
        self.first_text = WaitTimes()
        self.tokens = 0
        self.cost_usd = 0.0

    @property
    def failed(self) -> int:
        """The number of turns that ended with an error."""
        return self.errors.total()

    @property
    def finished(self) -> int:
        """The number of turns that ended."""
        return self.succeeded + self.failed

    @property
    def success_rate(self) -> float:
        """The share of planned turns that succeeded. Turns that were never sent count as failures."""
        return self.succeeded / self.planned if self.planned else 1.0

    def as_json(self, *, seconds: float, **more: Any) -> dict[str, Any]:
        """Return the result for the output file."""
        return {
            **more,
            "duration_seconds": round(seconds, 3),
            "turns": {"planned": self.planned, "succeeded": self.succeeded, "failed": self.failed,
                      "success_rate": round(self.success_rate, 6),
                      "per_second": round(self.finished / seconds, 3) if seconds else 0.0},
            "errors": dict(self.errors.most_common()),
            "latency_ms": {"turn": self.turns.summary(), "first_text": self.first_text.summary()},
            "tokens": self.tokens,
            "cost_usd": round(self.cost_usd, 6),
        }  # fmt: skip

    def line(self, seconds: float, active: int) -> str:
        """Return the progress in one line."""
        rate = 100 * self.succeeded / self.finished if self.finished else 100.0
        return (
            f"{seconds:6.0f} s  {active:5} users  {self.finished}/{self.planned} turns  {rate:6.2f}% ok  "
            f"p50 {self.turns.at(50):.0f} ms  p95 {self.turns.at(95):.0f} ms  p99 {self.turns.at(99):.0f} ms"
        )
