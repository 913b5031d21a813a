"""Retry policy of the client: repeat what the server marks as retryable and what is safe to repeat. Pure.

`Retry-After` is honoured; if it is longer than `longest` seconds, the error is raised at once. A request that may have
arrived is repeated only if that is safe: reads, and writes with an `Idempotency-Key`, for which the server repeats its
first answer. A turn that ran tools or produced text is never repeated, because the server marks its failure as not
retryable.
"""

import random
import time
from dataclasses import dataclass

from hypercore_agents.client.errors import ClientError, ServerError, Unreachable

_LONGEST_OUTAGE_PAUSE = 5.0


@dataclass(frozen=True)
class Retrying:
    """At most `attempts` attempts; pauses double from `first` to `longest` seconds, with jitter.

    If the server cannot be reached or answers `unavailable`, attempts continue for `outage` seconds instead, because a
    restart takes longer than a few attempts. `attempts=1` disables retries.
    """

    attempts: int = 4
    first: float = 0.5
    longest: float = 30.0
    outage: float = 60.0

    def pause(
        self, error: ClientError, attempt: int, *, repeatable: bool, since: float = 0.0, seconds: float = 0.0
    ) -> float | None:
        """Return the seconds to wait after failed attempt number `attempt` (from 1), None to give up.

        `since` is the time since the first failure, `seconds` the time limit of the call's answer.
        """
        if self.attempts == 1:
            return None
        backoff: float = min(self.longest, self.first * 2.0 ** min(attempt - 1, 20)) * random.uniform(0.75, 1.0)  # noqa: S311
        if isinstance(error, ServerError):
            wait = error.retry_after or 0.0
            if not error.retryable or wait > self.longest:
                return None
            if error.type == "conflict":  # the first request with this key is still in progress
                return max(wait, min(backoff, _LONGEST_OUTAGE_PAUSE)) if since < seconds else None
            if error.type == "unavailable":
                return max(wait, min(backoff, _LONGEST_OUTAGE_PAUSE)) if since < self.outage else None
            return max(wait, backoff) if attempt < self.attempts else None
        if isinstance(error, Unreachable) and (repeatable or not error.sent) and since < self.outage:
            return min(backoff, _LONGEST_OUTAGE_PAUSE)
        return None


class Retries:
    """Counts the failures of one call."""

    def __init__(self, retrying: Retrying) -> None:
        self._retrying = retrying
        self._failures = 0
        self._first = 0.0

    def reset(self) -> None:
        """Reset the count after progress."""
        self._failures = 0

    def pause(self, error: ClientError, *, repeatable: bool, seconds: float = 0.0) -> float | None:
        """Count a failure; return the seconds to wait before the next attempt, None to give up."""
        if self._failures == 0:
            self._first = time.monotonic()
        self._failures += 1
        since = time.monotonic() - self._first
        return self._retrying.pause(error, self._failures, repeatable=repeatable, since=since, seconds=seconds)
