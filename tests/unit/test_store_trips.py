"""The number of calls to the connection's thread in a write transaction."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from hypercore_agents.store import sqlite
from hypercore_agents.store.database import Database, sqlite_url

_COUNT = text("SELECT count(*) FROM t")
_ADD = text("INSERT INTO t VALUES (:n)")


@pytest.fixture
def thread_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    real = sqlite._Connection.run_in_thread

    async def counted(self: Any, work: Any) -> Any:
        made.append("call")
        return await real(self, work)

    monkeypatch.setattr(sqlite._Connection, "run_in_thread", counted)
    return made


async def test_look_ups_without_locks_need_no_thread_call(tmp_path: Path, thread_calls: list[str]) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    look_up = _COUNT.execution_options(**sqlite.ON_EVENT_LOOP)
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
    thread_calls.clear()
    async with database.read() as connection:
        assert (await connection.execute(look_up)).scalar_one() == 0
    assert not thread_calls
    async with database.write() as connection:
        assert (await connection.execute(look_up)).scalar_one() == 0
        assert len(thread_calls) == 1, "the thread waits for the lock"
        assert (await connection.execute(look_up)).scalar_one() == 0
        assert len(thread_calls) == 1, "a transaction with the lock does not wait"
        await connection.execute(_ADD, [{"n": 1}])
        assert (await connection.execute(look_up)).scalar_one() == 1, "deferred statements run first"
        assert len(thread_calls) == 2
    await database.close()


async def test_begin_and_lists_of_rows_are_deferred(tmp_path: Path, thread_calls: list[str]) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
    thread_calls.clear()
    async with database.write() as connection:
        await connection.execute(_ADD, [{"n": 1}, {"n": 2}])
        assert (await connection.execute(_COUNT)).scalar_one() == 2, "in order, with one call"
        await connection.execute(_ADD, [{"n": 3}, {"n": 4}])
    assert len(thread_calls) == 2, "BEGIN and two rows run with the count, the last rows with the commit"
    async with database.write():
        pass
    assert len(thread_calls) == 2, "an empty transaction needs no call"
    async with database.write() as connection:
        await connection.execute(_ADD.execution_options(**sqlite.DEFERRED), {"n": 9})
    assert len(thread_calls) == 3, "a whole transaction with one call"
    with pytest.raises(IntegrityError):
        async with database.write() as connection:
            await connection.execute(_ADD, [{"n": 5}, {"n": 1}])
    async with database.read() as connection:
        assert (await connection.execute(_COUNT)).scalar_one() == 5, "a failed transaction is rolled back"
    await database.close()
