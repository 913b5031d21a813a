"""How many answers of one kind a user has open at a time, event streams and downloads: counted in this process.

Invariants: what was counted is given back when its answer ends, however it ends; one user's answers never take from
another's. Rejected: counting in the store (a write per download; a process that dies would leave its counts behind).
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
    """Open answers of one kind by user. `most` 0: no limit; `setting` names it in errors, `noun` what is counted."""

    def __init__(self, share: str, noun: str, setting: str, most: int) -> None:
        self.share = share
        self._noun = noun
        self._setting = setting
        self._most = most
        self._open: Counter[str] = Counter()

    def require(self, user_id: str) -> None:
        """Raise RateLimited when the user may open no more."""
        used = self._open[user_id]
        if self._most and used >= self._most:
            raise RateLimited(
                f"user {user_id} has {used} {self._noun} open and may have {self._most} ({self._setting}); "
                "close one first",
                details={"share": self.share, "used": used, "limit": self._most},
                retry_after=5,
            )

    @contextlib.contextmanager
    def open(self, user_id: str) -> Iterator[None]:
        """Count one until the end of the block. Raises RateLimited."""
        self.require(user_id)
        self._open[user_id] += 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]

    def view(self) -> ShareView:
        """Return the limit and what the users with the most have open."""
        return ShareView(limit=self._most or None, used=dict(self._open.most_common(_SHOWN)))
