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
def trips(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    real = sqlite._Connection.run_in_thread

    async def counted(self: Any, work: Any) -> Any:
        made.append("call")
        return await real(self, work)

    monkeypatch.setattr(sqlite._Connection, "run_in_thread", counted)
    return made


async def test_look_ups_without_locks_need_no_thread_call(tmp_path: Path, trips: list[str]) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    at_once = _COUNT.execution_options(**sqlite.ON_EVENT_LOOP)
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
    trips.clear()
    async with database.read() as connection:
        assert (await connection.execute(at_once)).scalar_one() == 0
    assert not trips
    async with database.write() as connection:
        assert (await connection.execute(at_once)).scalar_one() == 0
        assert len(trips) == 1, "the lock is waited for in the thread"
        assert (await connection.execute(at_once)).scalar_one() == 0
        assert len(trips) == 1, "who has the lock waits for nobody"
        await connection.execute(_ADD, [{"n": 1}])
        assert (await connection.execute(at_once)).scalar_one() == 1, "what rides comes first"
        assert len(trips) == 2
    await database.close()


async def test_begin_and_lists_of_rows_are_deferred(tmp_path: Path, trips: list[str]) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
    trips.clear()
    async with database.write() as connection:
        await connection.execute(_ADD, [{"n": 1}, {"n": 2}])
        assert (await connection.execute(_COUNT)).scalar_one() == 2, "in order, though on one way"
        await connection.execute(_ADD, [{"n": 3}, {"n": 4}])
    assert len(trips) == 2, "the beginning and two rows with the count, the last rows with the commit"
    async with database.write():
        pass
    assert len(trips) == 2, "what was not begun is not ended"
    async with database.write() as connection:
        await connection.execute(_ADD.execution_options(**sqlite.DEFERRED), {"n": 9})
    assert len(trips) == 3, "a whole transaction on one way"
    with pytest.raises(IntegrityError):
        async with database.write() as connection:
            await connection.execute(_ADD, [{"n": 5}, {"n": 1}])
    async with database.read() as connection:
        assert (await connection.execute(_COUNT)).scalar_one() == 5, "nothing of a transaction that failed"
    await database.close()
