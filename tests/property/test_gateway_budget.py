"""Session budgets with concurrent requests: the ledger stays within the budget, and no reservation remains.

One test runs hundreds of simulated requests with any order of their steps; another runs the real gateway with the
numbers of the simulator as truth.
"""

import asyncio
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypercore_agents.api.errors import BudgetExceeded, RateLimited, Unavailable
from hypercore_agents.gateway.budget import Budgets, Reservation
from hypercore_agents.gateway.input_bounds import max_input_tokens
from hypercore_agents.gateway.pricing import Price, PriceList
from hypercore_agents.gateway.request_rules import ModelRequest, Policy, SessionRules, apply_rules
from hypercore_agents.store.database import sqlite_url
from support.gateway_server import MODEL, gateway_site
from support.simulator_fixtures import RunningSimulator

PRICE = Price(input=3, output=15, cache_read=0.3, cache_write=3.75)


@dataclass(frozen=True)
class Played:
    """One request: its size, its true input as a share of the bound, its output as a share of the cap, its end."""

    text: int
    asked: int
    true_share: float
    produced_share: float
    ends: str
    pauses: tuple[int, int, int, int]


PLAYED = st.builds(
    Played,
    text=st.integers(0, 40_000),
    asked=st.integers(1, 64_000),
    true_share=st.floats(0, 1),
    produced_share=st.floats(0, 1),
    ends=st.sampled_from(("complete", "complete", "complete", "refused", "count_fails", "crash", "unbilled")),
    pauses=st.tuples(*[st.integers(0, 6)] * 4),
)


def request_of(played: Played) -> ModelRequest:
    content = "x" * played.text
    body = {"model": "claude-x", "max_tokens": played.asked, "messages": [{"role": "user", "content": content}]}
    return apply_rules(json.dumps(body).encode(), SessionRules(), Policy())


async def pause(steps: int) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)


class Session:
    """One session and its ledger; `unbilled` was spent but is not in the ledger."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.ledger: list[int] = []
        self.unbilled = 0
        self.budgets = Budgets(PriceList({"claude-x": PRICE}), self.spent, patience=5)

    async def spent(self, _: str) -> int:
        await pause(2)
        found = sum(self.ledger)
        await pause(2)
        return found

    async def play(self, played: Played) -> str:
        request = request_of(played)
        true_input = int(max_input_tokens(request) * played.true_share)

        async def count() -> int:
            await pause(played.pauses[0])
            if played.ends == "count_fails":
                raise Unavailable("the API does not count tokens")
            return true_input

        await pause(played.pauses[1])
        try:
            reservation, _ = await self.budgets.reserve("s", self.budget, request, count)
        except (BudgetExceeded, Unavailable) as error:
            return error.type
        try:
            await pause(played.pauses[2])
            if played.ends == "crash":
                raise asyncio.CancelledError
            if played.ends != "refused":
                await self.charge(played, request, reservation, true_input)
            return played.ends
        except asyncio.CancelledError:
            return "crash"
        finally:
            reservation.release()

    async def charge(self, played: Played, request: ModelRequest, reservation: Reservation, true_input: int) -> None:
        output = int(request.body["max_tokens"] * played.produced_share)
        cost = round(true_input * PRICE.cache_write + output * PRICE.output)
        async with reservation.lock:
            await pause(played.pauses[3])
            if played.ends == "unbilled":
                self.unbilled += cost
                reservation.release(unbilled=cost)
                return
            self.ledger.append(cost)
            await pause(played.pauses[3])
            reservation.release()
        assert sum(self.ledger) + self.unbilled <= self.budget * 1e6


@settings(max_examples=150, deadline=None)
@given(budget=st.floats(0.0005, 2), requests=st.lists(PLAYED, min_size=1, max_size=8))
def test_no_order_of_requests_exceeds_the_budget(budget: float, requests: list[Played]) -> None:
    async def run() -> None:
        session = Session(budget)
        await asyncio.gather(*(session.play(played) for played in requests))
        assert sum(session.ledger) + session.unbilled <= budget * 1e6
        assert session.budgets.reserved() == 0
        assert bool(session.budgets._accounts) == (session.unbilled > 0)

    asyncio.run(run())


async def test_a_request_waits_for_reservations_to_be_released() -> None:
    session = Session(0.05)
    small = Played(4, 64_000, 0.5, 0.1, "complete", (0, 0, 0, 0))

    async def count() -> int:
        return 10

    first, _ = await session.budgets.reserve("s", 0.05, request_of(small), count)
    second = asyncio.create_task(session.budgets.reserve("s", 0.05, request_of(small), count))
    await pause(50)
    assert not second.done()
    first.release()
    async with asyncio.timeout(5):
        (await second)[0].release()
    assert session.budgets.reserved() == 0


async def test_a_request_that_waits_too_long_must_retry() -> None:
    session = Session(0.05)
    session.budgets._patience = 0.01
    played = Played(4, 64_000, 0.5, 0.1, "complete", (0, 0, 0, 0))

    async def count() -> int:
        return 10

    first, _ = await session.budgets.reserve("s", 0.05, request_of(played), count)
    with pytest.raises(RateLimited) as refused:
        await session.budgets.reserve("s", 0.05, request_of(played), count)
    assert refused.value.retry_after == 1
    first.release()
    assert session.budgets.reserved() == 0
    assert session.budgets._accounts == {}


ENDS = (
    "[[tokens 400]]",
    "[[tokens 30]]",
    "[[say hello]]",
    "[[fault 500]]",
    "[[fault 429]]",
    "[[tokens 50]] [[fault cut]]",
    "[[fault refuse]]",
    "LEAVE [[ttft 0.05]] [[tokens 60]] [[rate 400]]",
    "[[ttft 0.02]] [[tokens 90]]",
)
PROMPTS = st.builds(lambda filler, rest: f"{'x' * filler} {rest}", st.integers(0, 3000), st.sampled_from(ENDS))


def test_the_gateways_ledger_stays_within_the_budget(tmp_path: Path, simulator: RunningSimulator) -> None:
    outcomes: set[int] = set()

    async def ask(site: Any, token: str, prompt: str, stream: bool) -> None:
        messages = [{"role": "user", "content": prompt}]
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(0.1 if "LEAVE" in prompt else 30):
                outcomes.add((await site.ask(token=token, messages=messages, max_tokens=32_000, stream=stream))[0])

    async def scenario(site: Any, budget: float, prompts: list[tuple[str, bool]]) -> None:
        session_id = await site.session(model=MODEL, max_budget_usd=budget)
        turn = await site.turn(session_id)
        assert turn == 1
        await asyncio.gather(*(ask(site, site.token(session_id), prompt, stream) for prompt, stream in prompts))
        budgets = site.app._model._app._budgets
        async with asyncio.timeout(30):
            while budgets._accounts:
                await asyncio.sleep(0.005)
        spent = sum(entry.cost_micro_usd for entry in await site.entries() if entry.session_id == session_id)
        assert spent <= budget * 1e6

    with asyncio.Runner() as runner:
        context = gateway_site(tmp_path, sqlite_url(tmp_path / "store.db"), simulator.url)
        site = runner.run(context.__aenter__())

        @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(
            budget=st.floats(0.0005, 0.02),
            prompts=st.lists(st.tuples(PROMPTS, st.booleans()), min_size=2, max_size=8),
        )
        def holds(budget: float, prompts: list[tuple[str, bool]]) -> None:
            runner.run(scenario(site, budget, prompts))

        try:
            holds()
        finally:
            runner.run(context.__aexit__(None, None, None))
    assert {200, 403} <= outcomes
