"""A queue of waiting turns in which users take turns, so that one user's many turns do not keep the others waiting.

Invariants: users are served round-robin; the turns of one user are served in the order in which they came. A waiter
that was cancelled or removed is skipped.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Waiters with an item each, by user."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[tuple[T, asyncio.Future[None]]]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def users(self) -> Iterable[str]:
        """Users who wait, the next one first."""
        return tuple(self._lines)

    def of_users(self) -> dict[str, int]:
        """Return how many waiters each user has."""
        return {user_id: len(line) for user_id, line in self._lines.items()}

    def ahead(self, user_id: str) -> int:
        """Return how many waiters are served before one that this user would add now."""
        own = len(self._lines.get(user_id, ()))
        others = (min(len(line), own + 1) for user, line in self._lines.items() if user != user_id)
        return own + sum(others)

    def join(self, user_id: str, item: T) -> "asyncio.Future[None]":
        """Add a waiter; the future is its place."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(user_id, deque()).append((item, place))
        self._length += 1
        return place

    def leave(self, user_id: str, place: "asyncio.Future[None]") -> None:
        """Remove a waiter. Safe to repeat, and after it was served."""
        line = self._lines.get(user_id)
        entry = next((entry for entry in line or () if entry[1] is place), None)
        if line is not None and entry is not None:
            line.remove(entry)
            self._length -= 1
            if not line:
                del self._lines[user_id]

    def take(self, may: Callable[[str], bool] = lambda _: True) -> "tuple[T, asyncio.Future[None]] | None":
        """Remove and return the next waiter that still waits, of a user who may be served; None: there is none."""
        while (user_id := next(filter(may, self._lines), None)) is not None:
            line = self._lines.pop(user_id)
            item, place = line.popleft()
            self._length -= 1
            if line:
                self._lines[user_id] = line  # behind the other users
            if not place.done():
                return item, place
        return None
