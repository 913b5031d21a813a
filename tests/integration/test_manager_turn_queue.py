"""The turn queue: a turn that leaves it at any moment does not block others."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import cast

import pytest
from sqlalchemy import func, select

from hypercore_agents.manager.sessions.turn_queue import TurnQueues
from hypercore_agents.store import tables
from hypercore_agents.store.database import Connection, Database


class Halting:
    """A store that halts when a transaction has begun, or when it is committed and has not returned yet."""

    def __init__(self, database: Database, halts: str) -> None:
        self._database = database
        self._halts = halts
        self.halted = asyncio.Event()
        self.proceed = asyncio.Event()
        self.write_one = database.write_one

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[Connection]:
        async with self._database.write() as connection:
            await self._halt("begun")
            yield connection
        await self._halt("committed")

    async def _halt(self, where: str) -> None:
        if where == self._halts:
            self.halted.set()
            await self.proceed.wait()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("halts", ["begun", "committed"])
@pytest.mark.parametrize("cancelled", [1, 2])
async def test_a_cancelled_join_leaves_no_ticket(database: Database, halts: str, cancelled: int) -> None:
    store, advanced = Halting(database, halts), asyncio.Event()
    queues = TurnQueues(
        cast(Database, store), "me", max_wait=lambda: 60.0, on_advance=lambda _: advanced.set(), clock=time.time
    )

    async def join() -> None:
        async with queues.join("session"):
            pytest.fail("it was cancelled before")

    joining = asyncio.create_task(join())
    await store.halted.wait()
    for _ in range(cancelled):  # the second one cancels the removal of the ticket
        joining.cancel()
        await asyncio.sleep(0)
    store.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await joining
    await asyncio.wait_for(advanced.wait(), 30)
    assert not queues.has_queued("session")
    async with database.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(tables.waiting_turns))).scalar_one() == 0
