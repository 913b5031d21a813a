"""Session budgets: before a model request is sent, its maximum cost is reserved from what the session has left.

Invariants:

- The ledger never exceeds `max_budget_usd`, however requests interleave: a session has left its budget, minus the
  ledger, minus the reservations of running requests. Reading the ledger and reserving happen under the session's lock,
  and so do writing an entry and releasing its reservation; so no request is counted twice or not at all.
- A reservation is released however its request ends. A charge that could not be written to the ledger counts as spent
  until it is written (`ledger_retry.py`).

The maximum cost of a request is its input at the highest price that can apply (a cache write, a long context), plus
`max_tokens`, plus every use of the tools that the API runs itself. The first bound is computed from the body
(`input_bounds.py`), which is free. Only if that does not fit does the API count the request's tokens (also free). Then
`max_tokens` is lowered to what the budget can pay for, or the request is rejected. A capped request leaves half of the
rest to others, unless it would get fewer than `_ENOUGH` tokens. A request that would fit without the reservations of
others waits until a running request ends.

Reservations live in this process: all requests of a session must pass through one gateway, as they do if its agent has
a single gateway address. Rejected: reservations in the store (two more statements per model request, and a crash would
leave them behind).
"""

import asyncio
import math
from collections.abc import Awaitable, Callable

from hypercore_agents.api.errors import BudgetExceeded, RateLimited
from hypercore_agents.gateway.input_bounds import max_input_tokens, server_tool_units
from hypercore_agents.gateway.pricing import PriceList
from hypercore_agents.gateway.request_rules import ModelRequest, cap_output

_ENOUGH = 8192
"""Output tokens that are enough for almost every answer."""
_MAX_OUTPUT = 10**9


class _Account:
    """Reservations and unrecorded charges of one session, in micro-dollars. `users` counts requests that need it."""

    __slots__ = ("changed", "lock", "reserved", "unrecorded", "users")

    def __init__(self) -> None:
        self.reserved = 0
        self.unrecorded = 0
        self.users = 0
        self.lock = asyncio.Lock()
        self.changed = asyncio.Event()


class Reservation:
    """The reserved maximum cost of one request. Code that sets `charging` releases it, else the sender does."""

    __slots__ = (
        "_account",
        "_close_account",
        "_reserved",
        "_unbilled",
        "charging",
        "input_tokens",
        "max_micro_usd",
        "output_tokens",
    )

    def __init__(
        self,
        account: _Account,
        reserved: int,
        input_tokens: int,
        output_tokens: int,
        close_account: Callable[[], None],
    ) -> None:
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.max_micro_usd = reserved
        self.charging = False
        self._account = account
        self._reserved: int | None = reserved
        self._unbilled = 0
        self._close_account = close_account
        account.reserved += reserved

    @property
    def lock(self) -> asyncio.Lock:
        """To be held while the ledger entry is written and the reservation released."""
        return self._account.lock

    def release(self, unbilled: int = 0) -> None:
        """Release the reservation. `unbilled` was spent, but is not in the ledger until `recorded`. Safe to repeat."""
        if self._reserved is None:
            return
        self._account.reserved -= self._reserved
        self._account.unrecorded += unbilled
        self._reserved, self._unbilled = None, unbilled
        self._account.changed.set()
        self._account.changed = asyncio.Event()
        if not unbilled:
            self._close_account()

    def recorded(self) -> None:
        """Note that the unbilled charge is in the ledger now."""
        self._account.unrecorded -= self._unbilled
        if self._unbilled:
            self._unbilled = 0
            self._close_account()


class Budgets:
    """Makes reservations. `spent` returns the cost of a session by the ledger, in micro-dollars.

    `patience` is the maximum wait for running requests, in seconds.
    """

    def __init__(self, prices: PriceList, spent: Callable[[str], Awaitable[int]], *, patience: float = 60.0) -> None:
        self._prices = prices
        self._spent = spent
        self._patience = patience
        self._accounts: dict[str, _Account] = {}

    def reserved(self) -> int:
        """Return the sum of all reservations, in micro-dollars."""
        return sum(account.reserved for account in self._accounts.values())

    async def reserve(
        self, session_id: str, budget_usd: float, request: ModelRequest, count: Callable[[], Awaitable[int | None]]
    ) -> tuple[Reservation, int]:
        """Reserve the request's maximum cost, after capping `max_tokens` to it.

        Returns the reservation and what the session had left before, in micro-dollars. `count` has the API count the
        request's input tokens; None if the API does not count. Raises BudgetExceeded, RateLimited (running requests
        hold what is left for too long), or what `count` raises.
        """
        account = self._accounts.setdefault(session_id, _Account())
        account.users += 1

        def close_account() -> None:
            account.users -= 1
            if not account.users:
                self._accounts.pop(session_id, None)

        try:
            return await self._reserve(account, session_id, budget_usd, request, count, close_account)
        except BaseException:
            close_account()
            raise

    async def _reserve(
        self,
        account: _Account,
        session_id: str,
        budget_usd: float,
        request: ModelRequest,
        count: Callable[[], Awaitable[int | None]],
        close_account: Callable[[], None],
    ) -> tuple[Reservation, int]:
        until = asyncio.get_running_loop().time() + self._patience
        price, budget = self._prices.of(request.model), round(budget_usd * 1e6)
        hourly = b'"1h"' in request.encoded()
        units = math.ceil(sum(count * price.unit_micro_usd(name) for name, count in server_tool_units(request).items()))
        tokens, counted = (
            max_input_tokens(request) if request.max_input_tokens is None else request.max_input_tokens,
            False,
        )
        asked = min(request.body["max_tokens"], _MAX_OUTPUT)
        while True:
            async with account.lock:
                changed = account.changed
                left = budget - await self._spent(session_id) - account.unrecorded
                rates = price.at(tokens)
                highest = max(rates.highest_input, 2 * rates.input if hourly else 0)
                free, given = left - account.reserved, math.ceil(tokens * highest) + units
                produced = _affordable(free - given, rates.output, asked)
                if produced >= (1 if counted and not account.reserved else min(asked, _ENOUGH)):
                    if produced < asked:
                        cap_output(request, max(min(produced, _ENOUGH), produced // 2))
                    output = min(request.body["max_tokens"], _MAX_OUTPUT)
                    reserved = given + math.ceil(output * rates.output)
                    return Reservation(account, reserved, tokens, output, close_account), left
                if left <= 0:
                    raise _budget_spent(budget_usd)
                if counted and _affordable(left - given, rates.output, asked) < 1:
                    raise _request_too_expensive(budget_usd, left, tokens, given)
            if not counted:
                exact, counted = await count(), True
                tokens = tokens if exact is None else min(tokens, exact)
                continue
            try:
                async with asyncio.timeout_at(until):
                    await changed.wait()
            except TimeoutError:
                raise RateLimited(
                    "running requests of this session have reserved the rest of its budget; wait for one of them",
                    retry_after=1,
                ) from None


def _affordable(micro_usd: int, price: float, asked: int) -> int:
    """Return how many of the `asked` output tokens an amount pays for, rounded down."""
    if micro_usd < 0:
        return 0
    return asked if math.ceil(asked * price) <= micro_usd else int(micro_usd / price)


def _budget_spent(budget_usd: float) -> BudgetExceeded:
    return BudgetExceeded(
        f"this session has spent its budget of {budget_usd:g} USD; create a session with a higher max_budget_usd",
        details={"limit": "max_budget_usd", "max_budget_usd": budget_usd},
    )


def _request_too_expensive(budget_usd: float, left: int, tokens: int, given: int) -> BudgetExceeded:
    return BudgetExceeded(
        f"this session has {left / 1e6:g} USD left of its budget of {budget_usd:g} USD, and this request with up to "
        f"{tokens} input tokens can cost {given / 1e6:g} USD before its answer begins; create a session with a higher "
        "max_budget_usd",
        details={"limit": "max_budget_usd", "max_budget_usd": budget_usd, "left_usd": left / 1e6},
    )
