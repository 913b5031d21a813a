"""When a call is made again: what the server calls retryable, and what is done once however often it arrives. Pure.

`Retry-After` is honoured; one that is longer than `longest` seconds is the caller's to wait for, so the error is raised
at once. A request that may have arrived is sent again only if it is safe to repeat: reads, and writes that carry an
`Idempotency-Key`, whose answer the server gives again. A turn that ran tools or said text is never repeated: the server
calls its failure not retryable.
"""

import random
import time
from dataclasses import dataclass

from hypercore_agents.client.errors import ClientError, ServerError, Unreachable

_LONGEST_OUTAGE_PAUSE = 5.0


@dataclass(frozen=True)
class Retrying:
    """At most `attempts` tries; pauses double from `first` to `longest` seconds, with jitter.

    A server that cannot be reached, or says that a part of it is unavailable, is tried for `outage` seconds instead: a
    restart takes longer than a few tries. `attempts=1`: nothing is tried again.
    """

    attempts: int = 4
    first: float = 0.5
    longest: float = 30.0
    outage: float = 60.0

    def pause(
        self, error: ClientError, attempt: int, *, repeatable: bool, since: float = 0.0, seconds: float = 0.0
    ) -> float | None:
        """Return the seconds to wait after try number `attempt` (from 1) failed; None: give up.

        `since`: seconds since the first failure; `seconds`: how long the call's answer may take.
        """
        if self.attempts == 1:
            return None
        backoff: float = min(self.longest, self.first * 2.0 ** min(attempt - 1, 20)) * random.uniform(0.75, 1.0)  # noqa: S311
        if isinstance(error, ServerError):
            wait = error.retry_after or 0.0
            if not error.retryable or wait > self.longest:
                return None
            if error.type == "conflict":  # the first request with this key is still being answered
                return max(wait, min(backoff, _LONGEST_OUTAGE_PAUSE)) if since < seconds else None
            if error.type == "unavailable":
                return max(wait, min(backoff, _LONGEST_OUTAGE_PAUSE)) if since < self.outage else None
            return max(wait, backoff) if attempt < self.attempts else None
        if isinstance(error, Unreachable) and (repeatable or not error.sent) and since < self.outage:
            return min(backoff, _LONGEST_OUTAGE_PAUSE)
        return None


class Tries:
    """The failures of one call so far."""

    def __init__(self, retrying: Retrying) -> None:
        self._retrying = retrying
        self._failures = 0
        self._first = 0.0

    def reset(self) -> None:
        """Forget them: the call went on."""
        self._failures = 0

    def pause(self, error: ClientError, *, repeatable: bool, seconds: float = 0.0) -> float | None:
        """Count a failure; return the seconds to wait before the next try, None: give up."""
        if self._failures == 0:
            self._first = time.monotonic()
        self._failures += 1
        since = time.monotonic() - self._first
        return self._retrying.pause(error, self._failures, repeatable=repeatable, since=since, seconds=seconds)
