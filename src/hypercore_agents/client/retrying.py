"""When a call is made again: what the server calls retryable, and what certainly did not arrive. Pure.

`Retry-After` is honoured; one that is longer than `longest` seconds is the caller's to wait for, so the error is raised
at once. A request that may have arrived is sent again only if doing it twice is doing it once.
"""

import random
from dataclasses import dataclass

from hypercore_agents.client.errors import ClientError, ServerError, Unreachable


@dataclass(frozen=True)
class Retrying:
    """At most `attempts` tries; pauses double from `first` to `longest` seconds, with jitter."""

    attempts: int = 4
    first: float = 0.5
    longest: float = 30.0

    def pause(self, error: ClientError, attempt: int, *, repeatable: bool) -> float | None:
        """Return the seconds to wait after try number `attempt` (from 1) failed; None: give up."""
        if attempt >= self.attempts:
            return None
        backoff: float = min(self.longest, self.first * 2.0 ** (attempt - 1)) * random.uniform(0.75, 1.0)  # noqa: S311
        if isinstance(error, ServerError):
            if not error.retryable or (error.retry_after or 0) > self.longest:
                return None
            return max(error.retry_after or 0.0, backoff)
        if isinstance(error, Unreachable) and (repeatable or not error.sent):
            return backoff
        return None
