"""A budget of bytes that requests hold in memory, shared fairly among their holders.

Invariants:

- All holders together hold at most `total` bytes.
- One holder may hold at most as much as remains free: one greedy holder gets half of the total, two get a third each,
  and the next one always finds free bytes (the dynamic threshold of Choudhury and Hahne, 1998).
- Bytes are returned when their `HeldBytes` is released, even after errors.

A request with a known length takes all bytes at once and waits for them. A request in chunks takes bytes as they arrive
and never waits, because two half-received requests that wait for each other would never end.

Rejected: a fixed share for each user (too small for one large request or too large for all of them).
"""

import asyncio
from collections import Counter
from collections.abc import Callable

from hypercore_agents.api.errors import HypercoreError


class ByteBudget:
    """The budget. `refusal` creates the error for a request that does not fit within `patience` seconds."""

    def __init__(self, total: int, refusal: Callable[[], HypercoreError], *, patience: float = 10.0) -> None:
        self._total = total
        self._refusal = refusal
        self._patience = patience
        self._held: Counter[str] = Counter()
        self._total_held = 0
        self._changed = asyncio.Event()

    @property
    def held(self) -> int:
        """Bytes held by all holders."""
        return self._total_held

    def hold(self, *holders: str) -> "HeldBytes":
        """Return an empty `HeldBytes` that counts for each of these holders, for example a session and its user."""
        return HeldBytes(self, holders)

    def fits(self, holders: tuple[str, ...], size: int) -> bool:
        """Return whether `size` more bytes can be held now."""
        after = self._total_held + size
        return after <= self._total and all(
            self._held[name] + size <= self._total - self._total_held for name in holders
        )

    def change(self, holders: tuple[str, ...], size: int) -> None:
        """Count bytes that are taken, or returned (negative)."""
        self._total_held += size
        for name in holders:
            self._held[name] += size
            if not self._held[name]:
                del self._held[name]
        if size < 0:
            self._changed.set()
            self._changed = asyncio.Event()

    async def wait_for(self, holders: tuple[str, ...], size: int) -> None:
        """Return once `size` more bytes fit. Raises the refusal after `patience` seconds."""
        try:
            async with asyncio.timeout(self._patience):
                while not self.fits(holders, size):
                    await self._changed.wait()
        except TimeoutError:
            raise self._refusal() from None

    def refuse(self) -> HypercoreError:
        """Return the error for a request that does not fit."""
        return self._refusal()


class HeldBytes:
    """The bytes that one request holds. Use it as a context manager, or call `release`."""

    __slots__ = ("_budget", "_holders", "_size")

    def __init__(self, budget: ByteBudget, holders: tuple[str, ...]) -> None:
        self._budget = budget
        self._holders = holders
        self._size = 0

    async def take(self, size: int) -> None:
        """Hold `size` more bytes, waiting for them if necessary. Raises the budget's refusal."""
        if not self._budget.fits(self._holders, size):
            await self._budget.wait_for(self._holders, size)
        self._count(size)

    def grow(self, size: int) -> None:
        """Hold `size` more bytes now. Raises the budget's refusal."""
        if not self._budget.fits(self._holders, size):
            raise self._budget.refuse()
        self._count(size)

    def release(self) -> None:
        """Return all bytes. Safe to repeat."""
        if self._size:
            self._budget.change(self._holders, -self._size)
            self._size = 0

    def _count(self, size: int) -> None:
        if size:
            self._budget.change(self._holders, size)
            self._size += size

    def __enter__(self) -> "HeldBytes":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
