"""SQLite through aiosqlite with one trip to the connection's thread per statement.

SQLAlchemy's dialect for aiosqlite makes four trips for each (open a cursor, execute, fetch, close it), and a turn's
budget of a few milliseconds goes into waking threads. Here a statement is executed, fetched and closed in one trip, and
what has no answer rides with what comes next: a write transaction begins with its first statement, and rows that are
written as a list (`executemany`), or by a statement that says so (`RIDES`), go with the next statement or the commit,
which is where they fail if they fail.
Nothing is rolled back or committed that was not begun. Everything else is SQLAlchemy's and aiosqlite's.

A look-up by key that says so (`AT_ONCE`) makes no trip at all: it takes microseconds and waits for nobody, since
readers of a write-ahead log need no lock, and a write transaction that has begun holds its own.

Rejected: running all of SQLite on the event loop (whatever takes a lock waits while another process holds it, and would
stop every stream; so do a commit's writing and a long list's reading).
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import (
    AsyncAdapt_aiosqlite_connection,
    AsyncAdapt_aiosqlite_cursor,
    AsyncAdapt_aiosqlite_dbapi,
    SQLiteDialect_aiosqlite,
)
from sqlalchemy.util.concurrency import await_

T = TypeVar("T")
DRIVER = "sqlite+onetrip"
"""What takes the place of `sqlite+aiosqlite` in the engine's URL."""


RIDES = {"rides": True}
"""Execution options of a statement whose rows and row count nobody asks for. Other stores know nothing of it."""


AT_ONCE = {"at_once": True}
"""Execution options of a SELECT that finds few rows by an index. Other stores know nothing of it."""


class _Cursor(AsyncAdapt_aiosqlite_cursor):
    __slots__ = ("_found", "at_once", "rides")

    def __init__(self, adapt_connection: Any) -> None:
        self._adapt_connection = adapt_connection
        self._connection = adapt_connection._connection
        self._rows = deque()
        self._found: tuple[Any, int, int] = (None, -1, 0)
        self.rides = self.at_once = False

    @property
    def description(self) -> Any:
        return self._found[0]

    @property
    def rowcount(self) -> int:
        return self._found[1]

    @property
    def lastrowid(self) -> int:
        return self._found[2]

    @property
    def arraysize(self) -> int:
        return 1

    @arraysize.setter
    def arraysize(self, value: int) -> None:
        return

    def close(self) -> None:
        self._rows.clear()

    async def _async_soft_close(self) -> None:
        return

    async def _execute_async(self, operation: Any, parameters: Any) -> Any:
        await self._run(lambda raw: raw.execute(operation, () if parameters is None else parameters))

    async def _executemany_async(self, operation: Any, seq_of_parameters: Any) -> Any:
        self.rides = True
        await self._run(lambda raw: raw.executemany(operation, seq_of_parameters))

    async def _run(self, execute: Callable[[Any], Any]) -> None:
        adapted = cast(_Connection, self._adapt_connection)
        if self.rides and (adapted.riding or cast(Any, self._connection).in_transaction):
            adapted.riding.append(execute)
            return

        def fetched(raw: Any) -> tuple[Sequence[Any], tuple[Any, int, int]]:
            cursor = execute(raw)
            try:
                rows = cursor.fetchall() if cursor.description else ()
                return rows, (cursor.description, cursor.rowcount, cursor.lastrowid)
            finally:
                cursor.close()

        if self.at_once and adapted.idle:
            rows, self._found = fetched(cast(Any, self._connection)._conn)
        else:
            rows, self._found = await adapted.trip(fetched)
        self._rows = deque(rows)


class _Connection(AsyncAdapt_aiosqlite_connection):
    __slots__ = ("_done", "_sent", "riding")
    _cursor_cls = _Cursor

    def __init__(self, dbapi: Any, connection: Any) -> None:
        super().__init__(dbapi, connection)
        self.riding: list[Callable[[Any], object]] = []
        """What goes along with the next trip, in order."""
        self._sent = self._done = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is under way in the connection's thread, be it for somebody who was cancelled, or waits."""
        return self._sent == self._done and not self.riding

    async def trip(self, work: Callable[[Any], T]) -> T:
        """Do what rides, then this, in the connection's thread."""
        riding, self.riding = self.riding, []
        connection = cast(Any, self._connection)
        raw = connection._conn

        def once() -> T:
            try:
                for first in riding:
                    first(raw)
                return work(raw)
            finally:
                self._done += 1

        async with self._execute_mutex:
            self._sent += 1
            found: T = await connection._execute(once)
        return found

    def rollback(self) -> None:
        self.riding.clear()
        if self._sent != self._done or cast(Any, self._connection).in_transaction:
            await_(self.trip(lambda raw: raw.rollback()))

    def commit(self) -> None:
        if self.riding == [_begin]:
            self.riding.clear()
        if self.riding or cast(Any, self._connection).in_transaction:
            await_(self.trip(lambda raw: raw.commit()))


def _begin(raw: Any) -> None:
    raw.execute("BEGIN IMMEDIATE")


def begin_with_next(connection: Any) -> None:
    """Take SQLite's write lock with the next statement on this connection of SQLAlchemy's."""
    connection.connection.dbapi_connection.riding.append(_begin)


class _Module(AsyncAdapt_aiosqlite_dbapi):
    def connect(self, *arg: Any, **kw: Any) -> Any:
        connection = self.aiosqlite.connect(*arg, **kw)
        connection._thread.daemon = True
        return _Connection(self, await_(connection))


class OneTripDialect(SQLiteDialect_aiosqlite):
    """SQLAlchemy's dialect for aiosqlite, with our cursor."""

    driver = "onetrip"
    supports_statement_cache = True

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        """Execute, or have it ride or make no trip, where its statement says so."""
        if context is not None:
            cursor.rides = context.execution_options.get("rides", False)
            cursor.at_once = context.execution_options.get("at_once", False)
        cursor.execute(statement, parameters)

    @classmethod
    def import_dbapi(cls) -> Any:
        """Return the driver that connections are made with."""
        return _Module(__import__("aiosqlite"), __import__("sqlite3"))


registry.register("sqlite.onetrip", __name__, "OneTripDialect")
