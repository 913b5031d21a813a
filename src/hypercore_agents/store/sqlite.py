"""SQLite through aiosqlite, with one call to the connection's thread per statement.

SQLAlchemy's dialect for aiosqlite makes four calls per statement (open a cursor, execute, fetch, close it), and waking
threads takes most of a turn's budget of a few milliseconds. Here a statement is executed, fetched and closed in one
call, and statements without a result are deferred to the next call: a write transaction begins with its first
statement, and rows that are written as a list (`executemany`), or by a statement with the option `DEFERRED`, run with
the next statement or the commit, where their errors are raised.

Only what was begun is committed or rolled back. Everything else is SQLAlchemy's and aiosqlite's behaviour.

A look-up by key with the option `ON_EVENT_LOOP` needs no call at all and runs on the event loop: it takes microseconds
and never blocks, because readers of a write-ahead log need no lock, and a write transaction that has begun holds its
own.

Rejected: running all of SQLite on the event loop (a statement that takes a lock waits while another process holds it,
which would stop every stream; so would the write of a commit and the read of a long list).
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
"""Replaces `sqlite+aiosqlite` in the engine's URL."""


DEFERRED = {"deferred": True}
"""Execution options of a statement whose result and row count are not used. Other databases ignore them."""


ON_EVENT_LOOP = {"on_event_loop": True}
"""Execution options of a SELECT that finds few rows by an index. Other databases ignore them."""


class _Cursor(AsyncAdapt_aiosqlite_cursor):
    __slots__ = ("_found", "deferred", "on_event_loop")

    def __init__(self, adapt_connection: Any) -> None:
        self._adapt_connection = adapt_connection
        self._connection = adapt_connection._connection
        self._rows = deque()
        self._found: tuple[Any, int, int] = (None, -1, 0)
        self.deferred = self.on_event_loop = False

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
        self.deferred = True
        await self._run(lambda raw: raw.executemany(operation, seq_of_parameters))

    async def _run(self, execute: Callable[[Any], Any]) -> None:
        adapted = cast(_Connection, self._adapt_connection)
        if self.deferred and (adapted.deferred or cast(Any, self._connection).in_transaction):
            adapted.deferred.append(execute)
            return

        def fetched(raw: Any) -> tuple[Sequence[Any], tuple[Any, int, int]]:
            cursor = execute(raw)
            try:
                rows = cursor.fetchall() if cursor.description else ()
                return rows, (cursor.description, cursor.rowcount, cursor.lastrowid)
            finally:
                cursor.close()

        if self.on_event_loop and adapted.idle:
            rows, self._found = fetched(cast(Any, self._connection)._conn)
        else:
            rows, self._found = await adapted.run_in_thread(fetched)
        self._rows = deque(rows)


class _Connection(AsyncAdapt_aiosqlite_connection):
    __slots__ = ("_done", "_sent", "deferred")
    _cursor_cls = _Cursor

    def __init__(self, dbapi: Any, connection: Any) -> None:
        super().__init__(dbapi, connection)
        self.deferred: list[Callable[[Any], object]] = []
        """Statements that run with the next call, in order."""
        self._sent = self._done = 0

    @property
    def idle(self) -> bool:
        """Whether the connection's thread runs nothing, also not for a cancelled caller, and nothing is deferred."""
        return self._sent == self._done and not self.deferred

    async def run_in_thread(self, work: Callable[[Any], T]) -> T:
        """Run the deferred statements and then `work` in the connection's thread."""
        deferred, self.deferred = self.deferred, []
        connection = cast(Any, self._connection)
        raw = connection._conn

        def once() -> T:
            try:
                for first in deferred:
                    first(raw)
                return work(raw)
            finally:
                self._done += 1

        async with self._execute_mutex:
            self._sent += 1
            found: T = await connection._execute(once)
        return found

    def rollback(self) -> None:
        self.deferred.clear()
        if self._sent != self._done or cast(Any, self._connection).in_transaction:
            await_(self.run_in_thread(lambda raw: raw.rollback()))

    def commit(self) -> None:
        if self.deferred == [_begin]:
            self.deferred.clear()
        if self.deferred or cast(Any, self._connection).in_transaction:
            await_(self.run_in_thread(lambda raw: raw.commit()))


def _begin(raw: Any) -> None:
    raw.execute("BEGIN IMMEDIATE")


def begin_with_next(connection: Any) -> None:
    """Take SQLite's write lock with the next statement on this SQLAlchemy connection."""
    connection.connection.dbapi_connection.deferred.append(_begin)


class _Module(AsyncAdapt_aiosqlite_dbapi):
    def connect(self, *arg: Any, **kw: Any) -> Any:
        connection = self.aiosqlite.connect(*arg, **kw)
        connection._thread.daemon = True
        return _Connection(self, await_(connection))


class OneTripDialect(SQLiteDialect_aiosqlite):
    """SQLAlchemy's dialect for aiosqlite, with the cursor and connection of this module."""

    driver = "onetrip"
    supports_statement_cache = True

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        """Execute a statement: now, deferred (`DEFERRED`) or on the event loop (`ON_EVENT_LOOP`)."""
        if context is not None:
            cursor.deferred = context.execution_options.get("deferred", False)
            cursor.on_event_loop = context.execution_options.get("on_event_loop", False)
        cursor.execute(statement, parameters)

    @classmethod
    def import_dbapi(cls) -> Any:
        """Return the driver that creates connections."""
        return _Module(__import__("aiosqlite"), __import__("sqlite3"))


registry.register("sqlite.onetrip", __name__, "OneTripDialect")
