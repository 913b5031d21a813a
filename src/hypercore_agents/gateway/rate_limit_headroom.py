"""How much of the Claude API's rate limit is left, as its answers to the platform's key say.

Source: the headers `anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}` of every
answer of the Messages API (docs.claude.com, rate limits), and `retry-after` of a 429. After a limit's reset time it is
whole again, whether or not somebody asked meanwhile. Until an answer told, the gauges say 1 and the store nothing.

Only the platform's key counts: a user's own key has limits of its own, and one user who is out of them says nothing
about the pool. The autoscaler reads the least of the four: turns that wait while nothing is left wait for the API, and
more agents would not help. Its manager signals find it in the store, Prometheus in
`hypercore_gateway_rate_limit_headroom`.
"""

import datetime
import math
import time
from collections.abc import Callable, Mapping

from hypercore_agents.observability.metrics import GatewayMetrics
from hypercore_agents.store.database import Database
from hypercore_agents.store.signals import API_HEADROOM, put_signal

PUBLISH_SECONDS = 5.0
_UNSAID_RESET = 60.0
_LONGEST_RESET = 86_400.0


class RateLimitHeadroom:
    """Remembers what is left of each limit, as a share from 0 to 1. `clock` returns Unix seconds."""

    def __init__(self, metrics: GatewayMetrics, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._metrics = metrics
        self._database = database
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}
        self._told = math.nan

    def observe(self, status: int, headers: Mapping[str, str]) -> None:
        """Take note of one answer to the platform's key."""
        now = self._clock()
        for limit in GatewayMetrics.RATE_LIMITS:
            prefix = f"anthropic-ratelimit-{limit.replace('_', '-')}"
            most, left = _number(headers.get(f"{prefix}-limit")), _number(headers.get(f"{prefix}-remaining"))
            if most and left is not None:
                self._left[limit] = (min(1.0, left / most), _reset(headers.get(f"{prefix}-reset"), now))
        if status == 429:
            pause = _number(headers.get("retry-after"))
            until = now + min(_LONGEST_RESET, _UNSAID_RESET if pause is None else pause)
            if not any(left == 0 and reset > now for left, reset in self._left.values()):
                self._left["requests"] = (0.0, until)

    def show(self) -> float:
        """Set the gauges to what is left now; return the least of it, NaN while nothing is known."""
        now = self._clock()
        shares = {limit: 1.0 if now >= reset else left for limit, (left, reset) in self._left.items()}
        for limit, share in shares.items():
            self._metrics.headroom.labels(limit).set(share)
        return min(shares.values(), default=math.nan)

    async def publish(self) -> None:
        """Write the least into the store, unless it is unknown, or was and is whole."""
        least = self.show()
        if math.isnan(least) or least == self._told == 1.0:
            return
        async with self._database.write_one() as connection:
            await put_signal(connection, API_HEADROOM, least, now=self._clock())
        self._told = least


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() and len(text) < 16 else None


def _reset(text: str | None, now: float) -> float:
    """Return when a limit is whole again: an RFC 3339 time, kept within a day from now."""
    try:
        at = datetime.datetime.fromisoformat(text or "").timestamp()
    except (ValueError, OverflowError, OSError):
        return now + _UNSAID_RESET
    return min(max(at, now), now + _LONGEST_RESET)
