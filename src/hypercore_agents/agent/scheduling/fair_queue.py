"""The fair queue: waiting turns or starts, served user by user, so that one user's many turns do not delay the others.

Invariants: users are served round-robin; the waiters of one user are served in the order in which they came. A waiter
that was cancelled or removed is skipped.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Waiters by user, each with an item."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[tuple[T, asyncio.Future[None]]]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def users(self) -> Iterable[str]:
        """The users with waiters, the next one first."""
        return tuple(self._queues)

    def count_by_user(self) -> dict[str, int]:
        """Return how many waiters each user has."""
        return {user_id: len(queue) for user_id, queue in self._queues.items()}

    def ahead(self, user_id: str) -> int:
        """Return how many waiters would be served before a new one of this user."""
        own = len(self._queues.get(user_id, ()))
        others = (min(len(queue), own + 1) for user, queue in self._queues.items() if user != user_id)
        return own + sum(others)

    def join(self, user_id: str, item: T) -> "asyncio.Future[None]":
        """Add a waiter; the caller of `take` resolves the returned future."""
        served: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(user_id, deque()).append((item, served))
        self._length += 1
        return served

    def leave(self, user_id: str, served: "asyncio.Future[None]") -> None:
        """Remove a waiter. Safe to repeat, and after it was served."""
        queue = self._queues.get(user_id)
        entry = next((entry for entry in queue or () if entry[1] is served), None)
        if queue is not None and entry is not None:
            queue.remove(entry)
            self._length -= 1
            if not queue:
                del self._queues[user_id]

    def take(self, may: Callable[[str], bool] = lambda _: True) -> "tuple[T, asyncio.Future[None]] | None":
        """Remove and return the next waiter of a user for whom `may` is true; None when there is none."""
        while (user_id := next(filter(may, self._queues), None)) is not None:
            queue = self._queues.pop(user_id)
            item, served = queue.popleft()
            self._length -= 1
            if queue:
                self._queues[user_id] = queue  # behind the other users
            if not served.done():
                return item, served
        return None
