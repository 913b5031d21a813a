"""Retries of ledger entries: one shared attempt at a time; charges that shutdown interrupts are logged."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from structlog.testing import capture_logs

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.gateway import ledger_retry as module
from hypercore_agents.gateway.ledger_retry import LedgerRetry
from hypercore_agents.gateway.model_responses import ModelAnswer
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.store.ledger import LedgerEntry

ENTRY = LedgerEntry(
    created_at=1.0,
    user_id="ada",
    agent_id="agent-1",
    session_id="s",
    turn=1,
    model="claude-haiku-4-5",
    input_tokens=1,
    output_tokens=1,
    cache_read_tokens=0,
    cache_creation_tokens=0,
    cost_micro_usd=1,
    outcome="complete",
)


class Store:
    """A store whose writes wait for `go_on`, and fail while `away` is true."""

    def __init__(self) -> None:
        self.tries = 0
        self.taken: list[LedgerEntry] = []
        self.away = True
        self.go_on = asyncio.Event()

    @contextlib.asynccontextmanager
    async def write_one(self) -> AsyncIterator["Store"]:
        """Replace `Database.write_one`."""
        self.tries += 1
        await self.go_on.wait()
        if self.away:
            raise Unavailable("the store is away")
        yield self


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    async def add(connection: Any, entry: LedgerEntry) -> None:
        connection.taken.append(entry)

    monkeypatch.setattr(module, "add_entry", add)
    return Store()


def answer_of(store: Store, tasks: Tasks) -> ModelAnswer:
    """Return an answer that was cut before it began; its request is charged."""
    prices = SimpleNamespace(name_of=lambda model: model, cost_micro_usd=lambda model, tokens: 1)
    parts = SimpleNamespace(database=store, prices=prices, metrics=MagicMock(), tasks=tasks, ledger_retry=None)
    session = SimpleNamespace(user_id="ada", agent_id="agent-1", session_id="s", turn=1)
    return ModelAnswer(cast(Any, parts), cast(Any, SimpleNamespace(session=session)), "m", "req_1", charged=True)


@pytest.mark.parametrize("closed", [False, True])
async def test_a_charge_that_shutdown_interrupts_is_logged(store: Store, closed: bool) -> None:
    tasks = Tasks("gateway")
    if closed:
        await tasks.close()
    with capture_logs() as logs:
        calls = asyncio.create_task(answer_of(store, tasks).before_last())
        while not closed and not store.tries:
            await asyncio.sleep(0)
        await tasks.finish(within=0)
        with pytest.raises((asyncio.CancelledError, RuntimeError)):
            await calls
    (line,) = (line for line in logs if line["event"] == "ledger.write_failed")
    assert (line["user_id"], line["session_id"], line["turn"]) == ("ada", "s", 1)


async def test_concurrent_callers_share_one_attempt(store: Store) -> None:
    waiting = LedgerRetry(cast(Any, store))
    waiting.add(ENTRY, None)
    calls = [asyncio.create_task(waiting.write()) for _ in range(5)]
    await asyncio.sleep(0)
    store.go_on.set()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [Unavailable] * 5
    assert store.tries == 1
    store.away = False
    await waiting.write()
    assert store.taken == [ENTRY]
    await waiting.write()
    assert store.tries == 2, "no entry is waiting"


async def test_a_cancelled_caller_does_not_cancel_the_attempt(store: Store) -> None:
    waiting = LedgerRetry(cast(Any, store))
    store.away = False
    waiting.add(ENTRY, None)
    calls = asyncio.create_task(waiting.write())
    while not store.tries:
        await asyncio.sleep(0)
    calls.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls
    last = asyncio.create_task(waiting.try_write())
    await asyncio.sleep(0)
    store.go_on.set()
    await last
    assert store.taken == [ENTRY]
