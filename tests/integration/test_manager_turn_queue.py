"""A session's line: whoever leaves it, whenever, holds nobody up."""

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
    """A store that halts when a transaction has begun, or when it is committed but nobody was told yet."""

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
async def test_who_leaves_while_taking_a_ticket_leaves_none(database: Database, halts: str, cancelled: int) -> None:
    store, moved = Halting(database, halts), asyncio.Event()
    line = TurnQueues(
        cast(Database, store), "me", longest=lambda: 60.0, on_moved=lambda _: moved.set(), clock=time.time
    )

    async def stand() -> None:
        async with line.join("session"):
            pytest.fail("it was cancelled before")

    standing = asyncio.create_task(stand())
    await store.halted.wait()
    for _ in range(cancelled):  # also by whoever has no patience with the giving back
        standing.cancel()
        await asyncio.sleep(0)
    store.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await standing
    await asyncio.wait_for(moved.wait(), 30)
    assert not line.waits("session")
    async with database.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(tables.waiting_turns))).scalar_one() == 0
