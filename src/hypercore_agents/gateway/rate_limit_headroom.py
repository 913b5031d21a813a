"""How much of the Claude API's rate limits the platform's key has left, read from the headers of answers.

Source: the headers `anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}` of every
answer of the Messages API (docs.claude.com, rate limits), and `retry-after` of a 429. At its reset time a limit is
fully available again, whether or not a request was sent meanwhile. Before the first answer the gauges are 1 and the
store has no value.

Only the platform's key counts: a user's own key has its own limits, which do not concern the pool. The autoscaler uses
the lowest of the four shares: if nothing is left, waiting turns wait for the API, and more agents would not help. It
reads the value from the manager's signals, which come from the store, or from Prometheus
(`hypercore_gateway_rate_limit_headroom`).
"""

import datetime
import math
import time
from collections.abc import Callable, Mapping

from hypercore_agents.observability.metrics import GatewayMetrics
from hypercore_agents.store.database import Database
from hypercore_agents.store.signals import API_HEADROOM, put_signal

PUBLISH_SECONDS = 5.0
_DEFAULT_RESET = 60.0
_MAX_RESET = 86_400.0


class RateLimitHeadroom:
    """The remaining share of each rate limit, from 0 to 1. `clock` returns Unix seconds."""

    def __init__(self, metrics: GatewayMetrics, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._metrics = metrics
        self._database = database
        self._clock = clock
        self._remaining: dict[str, tuple[float, float]] = {}
        self._published = math.nan

    def observe(self, status: int, headers: Mapping[str, str]) -> None:
        """Read the headers of an answer to a request with the platform's key."""
        now = self._clock()
        for limit in GatewayMetrics.RATE_LIMITS:
            prefix = f"anthropic-ratelimit-{limit.replace('_', '-')}"
            most, left = _number(headers.get(f"{prefix}-limit")), _number(headers.get(f"{prefix}-remaining"))
            if most and left is not None:
                self._remaining[limit] = (min(1.0, left / most), _reset(headers.get(f"{prefix}-reset"), now))
        if status == 429:
            pause = _number(headers.get("retry-after"))
            until = now + min(_MAX_RESET, _DEFAULT_RESET if pause is None else pause)
            if not any(left == 0 and reset > now for left, reset in self._remaining.values()):
                self._remaining["requests"] = (0.0, until)

    def update_gauges(self) -> float:
        """Set the gauges to the shares that are left now; return the lowest, NaN before the first answer."""
        now = self._clock()
        shares = {limit: 1.0 if now >= reset else left for limit, (left, reset) in self._remaining.items()}
        for limit, share in shares.items():
            self._metrics.headroom.labels(limit).set(share)
        return min(shares.values(), default=math.nan)

    async def publish(self) -> None:
        """Write the lowest share into the store, unless it is unknown, or is 1 and was already written as 1."""
        lowest = self.update_gauges()
        if math.isnan(lowest) or lowest == self._published == 1.0:
            return
        async with self._database.write_one() as connection:
            await put_signal(connection, API_HEADROOM, lowest, now=self._clock())
        self._published = lowest


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() and len(text) < 16 else None


def _reset(text: str | None, now: float) -> float:
    """Return when a limit resets, from an RFC 3339 time; at most a day from now."""
    try:
        at = datetime.datetime.fromisoformat(text or "").timestamp()
    except (ValueError, OverflowError, OSError):
        return now + _DEFAULT_RESET
    return min(max(at, now), now + _MAX_RESET)
