"""A session's budget: before a request is sent on, what it can cost at most is taken out of what is left.

Invariants:

- The ledger never exceeds `max_budget_usd`, however requests interleave: what is left is the budget, less the ledger,
  less what running requests reserved. Reading the ledger and reserving, and writing an entry and giving its reservation
  back, each happen under the session's lock, so that no request is counted twice or not at all.
- A reservation is given back however its request ends. What could not be written to the ledger counts as spent until
  it is (`unwritten.py`).

How much a request can cost: its input at the dearest price that can apply (a cache write, a long context),
`max_tokens`, and every use of tools that the API runs itself. First with a bound from the body (`bounds.py`), which
costs nothing.
Only where that does not fit, the API is asked to count the request's tokens (free of charge). Then `max_tokens` is
lowered to what the rest pays for, or the request is refused.
A capped request leaves half of the rest to others, unless that would leave itself less than `_ENOUGH`. One that only
reservations keep from fitting waits until a running request ends.

Reservations live in this process: a session's requests must all pass one gateway, as they do wherever its agent has
one address for it. Rejected: reservations in the store (two more statements per model request, and a crash would leave
them behind).
"""

import asyncio
import math
from collections.abc import Awaitable, Callable

from hypercore_agents.api.errors import BudgetExceeded, RateLimited
from hypercore_agents.gateway.input_bounds import most_input_tokens, server_tool_units
from hypercore_agents.gateway.pricing import PriceList
from hypercore_agents.gateway.request_rules import ModelRequest, cap_output

_ENOUGH = 8192
"""Output tokens that are hardly ever too few for one answer."""
_MOST_OUTPUT = 10**9


class _Purse:
    """What one session's running requests hold, in micro-dollars. `users` are those that hold or want something."""

    __slots__ = ("changed", "lock", "lost", "reserved", "users")

    def __init__(self) -> None:
        self.reserved = 0
        self.lost = 0
        self.users = 0
        self.lock = asyncio.Lock()
        self.changed = asyncio.Event()


class Reservation:
    """What one request may cost at most. Whoever sets `charging` gives it back; else whoever sent the request does."""

    __slots__ = (
        "_held",
        "_purse",
        "_return",
        "_unbilled",
        "charging",
        "input_tokens",
        "most_micro_usd",
        "output_tokens",
    )

    def __init__(self, purse: _Purse, held: int, input_tokens: int, output_tokens: int, back: Callable[[], None]):
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.most_micro_usd = held
        self.charging = False
        self._purse = purse
        self._held: int | None = held
        self._unbilled = 0
        self._return = back
        purse.reserved += held

    @property
    def lock(self) -> asyncio.Lock:
        """Held while the ledger's entry is written and the reservation given back."""
        return self._purse.lock

    def release(self, unbilled: int = 0) -> None:
        """Give it back. `unbilled` was spent, and is not in the ledger until `written`. Safe to repeat."""
        if self._held is None:
            return
        self._purse.reserved -= self._held
        self._purse.lost += unbilled
        self._held, self._unbilled = None, unbilled
        self._purse.changed.set()
        self._purse.changed = asyncio.Event()
        if not unbilled:
            self._return()

    def written(self) -> None:
        """Say that what was unbilled is in the ledger now."""
        self._purse.lost -= self._unbilled
        if self._unbilled:
            self._unbilled = 0
            self._return()


class Budgets:
    """Reserves. `spent` returns what a session has cost by the ledger, in micro-dollars."""

    def __init__(self, prices: PriceList, spent: Callable[[str], Awaitable[int]], *, patience: float = 60.0) -> None:
        self._prices = prices
        self._spent = spent
        self._patience = patience
        self._purses: dict[str, _Purse] = {}

    def reserved(self) -> int:
        """Return what is reserved now, over all sessions."""
        return sum(purse.reserved for purse in self._purses.values())

    async def reserve(
        self, session_id: str, budget_usd: float, request: ModelRequest, count: Callable[[], Awaitable[int | None]]
    ) -> tuple[Reservation, int]:
        """Return a reservation, `max_tokens` capped to it, and what the session had left before it, in micro-dollars.

        `count` asks the API for the request's input tokens; None where it does not count. Raises BudgetExceeded, or
        RateLimited when running requests hold what is left for too long, or what `count` raises.
        """
        purse = self._purses.setdefault(session_id, _Purse())
        purse.users += 1

        def back() -> None:
            purse.users -= 1
            if not purse.users:
                self._purses.pop(session_id, None)

        try:
            return await self._reserve(purse, session_id, budget_usd, request, count, back)
        except BaseException:
            back()
            raise

    async def _reserve(
        self,
        purse: _Purse,
        session_id: str,
        budget_usd: float,
        request: ModelRequest,
        count: Callable[[], Awaitable[int | None]],
        back: Callable[[], None],
    ) -> tuple[Reservation, int]:
        until = asyncio.get_running_loop().time() + self._patience
        price, budget = self._prices.of(request.model), round(budget_usd * 1e6)
        hourly = b'"1h"' in request.encoded()
        units = math.ceil(sum(count * price.unit_micro_usd(name) for name, count in server_tool_units(request).items()))
        tokens, counted = most_input_tokens(request) if request.most_input is None else request.most_input, False
        asked = min(request.body["max_tokens"], _MOST_OUTPUT)
        while True:
            async with purse.lock:
                changed = purse.changed
                left = budget - await self._spent(session_id) - purse.lost
                rates = price.at(tokens)
                dearest = max(rates.dearest_input, 2 * rates.input if hourly else 0)
                free, given = left - purse.reserved, math.ceil(tokens * dearest) + units
                produced = _affordable(free - given, rates.output, asked)
                if produced >= (1 if counted and not purse.reserved else min(asked, _ENOUGH)):
                    if produced < asked:
                        cap_output(request, max(min(produced, _ENOUGH), produced // 2))
                    output = min(request.body["max_tokens"], _MOST_OUTPUT)
                    return Reservation(purse, given + math.ceil(output * rates.output), tokens, output, back), left
                if left <= 0:
                    raise _spent_up(budget_usd)
                if counted and _affordable(left - given, rates.output, asked) < 1:
                    raise _too_dear(budget_usd, left, tokens, given)
            if not counted:
                exact, counted = await count(), True
                tokens = tokens if exact is None else min(tokens, exact)
                continue
            try:
                async with asyncio.timeout_at(until):
                    await changed.wait()
            except TimeoutError:
                raise RateLimited(
                    "running requests of this session hold what is left of its budget; wait for one of them",
                    retry_after=1,
                ) from None


def _affordable(micro_usd: int, price: float, asked: int) -> int:
    """Return how many of the output tokens that were asked for this pays for, rounded down."""
    if micro_usd < 0:
        return 0
    return asked if math.ceil(asked * price) <= micro_usd else int(micro_usd / price)


def _spent_up(budget_usd: float) -> BudgetExceeded:
    return BudgetExceeded(
        f"this session has spent its budget of {budget_usd:g} USD; begin another with a higher max_budget_usd",
        details={"limit": "max_budget_usd", "max_budget_usd": budget_usd},
    )


def _too_dear(budget_usd: float, left: int, tokens: int, given: int) -> BudgetExceeded:
    return BudgetExceeded(
        f"this session has {left / 1e6:g} USD left of its budget of {budget_usd:g} USD, and this request with up to "
        f"{tokens} input tokens can cost {given / 1e6:g} USD before its answer begins; begin another session with a "
        "higher max_budget_usd",
        details={"limit": "max_budget_usd", "max_budget_usd": budget_usd, "left_usd": left / 1e6},
    )
