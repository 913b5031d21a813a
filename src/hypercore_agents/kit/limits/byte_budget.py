"""A budget of bytes that requests hold in memory, shared fairly among those who hold them.

Invariants:

- All holders together hold at most `total` bytes.
- A holder may hold as much as is left for all others: one greedy holder gets half of the total, two get a third
  each, and there is always something left for the next one (the dynamic threshold of Choudhury and Hahne, 1998).
- Bytes are given back when the `HeldBytes` is released, whatever happened in between.

A request whose length is announced takes it all at once and waits for it; one that arrives in chunks takes what comes
and never waits in the middle, because two half-received requests could wait for each other without end.

Rejected: a fixed share for each user (either too small for one large request or too large for all of them).
"""

import asyncio
from collections import Counter
from collections.abc import Callable

from hypercore_agents.api.errors import HypercoreError


class ByteBudget:
    """Counts held bytes. `refusal` creates the error of a request that does not fit; `patience` is in seconds."""

    def __init__(self, total: int, refusal: Callable[[], HypercoreError], *, patience: float = 10.0) -> None:
        self._total = total
        self._refusal = refusal
        self._patience = patience
        self._held: Counter[str] = Counter()
        self._in_all = 0
        self._changed = asyncio.Event()

    @property
    def held(self) -> int:
        """Bytes that are held now, in all."""
        return self._in_all

    def hold(self, *holders: str) -> "HeldBytes":
        """Return a hold of nothing yet, on behalf of each of these: a session and its user, for instance."""
        return HeldBytes(self, holders)

    def fits(self, holders: tuple[str, ...], size: int) -> bool:
        """Whether so many more bytes can be held now."""
        after = self._in_all + size
        return after <= self._total and all(self._held[name] + size <= self._total - self._in_all for name in holders)

    def change(self, holders: tuple[str, ...], size: int) -> None:
        """Count bytes that are taken, or given back (negative)."""
        self._in_all += size
        for name in holders:
            self._held[name] += size
            if not self._held[name]:
                del self._held[name]
        if size < 0:
            self._changed.set()
            self._changed = asyncio.Event()

    async def wait_for(self, holders: tuple[str, ...], size: int) -> None:
        """Return once so many bytes fit. Raises the refusal when they do not for too long."""
        try:
            async with asyncio.timeout(self._patience):
                while not self.fits(holders, size):
                    await self._changed.wait()
        except TimeoutError:
            raise self._refusal() from None

    def refuse(self) -> HypercoreError:
        """Return the error of a request that does not fit."""
        return self._refusal()


class HeldBytes:
    """What one request holds. Use it as a context manager, or call `release`."""

    __slots__ = ("_budget", "_holders", "_size")

    def __init__(self, budget: ByteBudget, holders: tuple[str, ...]) -> None:
        self._budget = budget
        self._holders = holders
        self._size = 0

    async def take(self, size: int) -> None:
        """Hold so many more bytes, and wait for them. Raises the budget's refusal."""
        if not self._budget.fits(self._holders, size):
            await self._budget.wait_for(self._holders, size)
        self._count(size)

    def grow(self, size: int) -> None:
        """Hold so many more bytes now. Raises the budget's refusal."""
        if not self._budget.fits(self._holders, size):
            raise self._budget.refuse()
        self._count(size)

    def release(self) -> None:
        """Give everything back. Safe to repeat."""
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
