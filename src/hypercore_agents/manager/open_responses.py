"""Limits the responses of one kind (event streams, downloads) that a user has open at a time in this process.

Invariants: a response no longer counts once it ends, however it ends; one user's responses never count for another.
Rejected: counting in the store (a write per download, and a process that dies would leave its counts behind).
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator

from hypercore_agents.api.agents import ShareView
from hypercore_agents.api.errors import RateLimited

_SHOWN = 20


def most_places(places: int, share: float) -> int:
    """Return how many of the pool's places one user may hold: a share of them, rounded up."""
    return max(1, math.ceil(places * share - 1e-9))


class OpenResponses:
    """Open responses of one kind, by user. `most`: the limit, 0 for none. Errors contain `setting` and `noun`."""

    def __init__(self, share: str, noun: str, setting: str, most: int) -> None:
        self.share = share
        self._noun = noun
        self._setting = setting
        self._most = most
        self._open: Counter[str] = Counter()

    def require(self, user_id: str) -> None:
        """Raise RateLimited if the user has reached the limit."""
        used = self._open[user_id]
        if self._most and used >= self._most:
            raise RateLimited(
                f"user {user_id} has {used} {self._noun} open, and the maximum is {self._most} ({self._setting}); "
                "close one first",
                details={"share": self.share, "used": used, "limit": self._most},
                retry_after=5,
            )

    @contextlib.contextmanager
    def open(self, user_id: str) -> Iterator[None]:
        """Count one response until the block ends. Raises RateLimited."""
        self.require(user_id)
        self._open[user_id] += 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]

    def view(self) -> ShareView:
        """Return the limit, and the counts of the users with the most open responses."""
        return ShareView(limit=self._most or None, used=dict(self._open.most_common(_SHOWN)))
