"""Connections and transactions of the store: all reads and writes of the store go through `Database`.

`read` runs on a pooled connection. `write` runs in a transaction that takes its lock with its first statement: on
SQLite `BEGIN IMMEDIATE` through one writer per process (count-then-insert under SQLite's default mode lets rows
past a limit), on PostgreSQL an ordinary transaction, whose statements carry their own guards.

A failed disk, a locked file or a lost server is raised as `Unavailable`.
"""

import asyncio
import base64
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import structlog
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util.concurrency import await_

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.kit.environment import SettingError
from hypercore_agents.store.sqlite import DRIVER, begin_with_next

_log = structlog.get_logger(__name__)

Connection: TypeAlias = AsyncConnection
"""A connection from `read` or `write`. Services only pass it to queries."""

SQLITE_BUSY_SECONDS = 10
_CHECK_BYTES = 12 * 1024
_CHECK = text(
    "INSERT INTO installation (name, value, updated_at) VALUES ('check', :value, :now) "
    "ON CONFLICT (name) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at"
)
_ADVISORY_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")


class DatabaseUrlError(SettingError):
    """`DATABASE_URL` cannot be used; the message says why and contains no password."""


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite store in a file."""
    return f"sqlite+aiosqlite:///{path}"


class Database:
    """The store of one process. Close it when the process ends."""

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):
            raise DatabaseUrlError(
                "DATABASE_URL is not a URL; use sqlite+aiosqlite:///PATH or postgresql+psycopg://USER@HOST/NAME"
            ) from None
        if parsed.drivername not in ("sqlite+aiosqlite", "postgresql+psycopg"):
            raise DatabaseUrlError(
                f"DATABASE_URL has driver {parsed.drivername!r}; use sqlite+aiosqlite or postgresql+psycopg"
            )
        self.is_sqlite = parsed.drivername.startswith("sqlite")
        if self.is_sqlite and parsed.database and not Path(parsed.database).parent.is_dir():
            raise DatabaseUrlError(f"DATABASE_URL points into a folder that is missing: {Path(parsed.database).parent}")
        if self.is_sqlite and parsed.database and parsed.database != ":memory:":
            _make_private(Path(parsed.database))
        self._engine = (
            _sqlite_engine(url) if self.is_sqlite else create_async_engine(url, pool_size=10, pool_pre_ping=True)
        )
        self._writer = asyncio.Lock()

    @property
    def shown_url(self) -> str:
        """The URL without its password."""
        url = self._engine.url.set(drivername="sqlite+aiosqlite") if self.is_sqlite else self._engine.url
        return url.render_as_string(hide_password=True)

    @property
    def engine(self) -> AsyncEngine:
        """The engine, for migrations."""
        return self._engine

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection for reading. Each statement sees one state; two statements may see different states."""
        with _translated():
            async with self._engine.connect() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def write(self, *, exclusive: str | None = None) -> AsyncIterator[AsyncConnection]:
        """Yield a connection in a write transaction, which is committed at the end and rolled back on any error.

        `exclusive` names what the transaction counts before it inserts; two transactions with the same name never
        overlap, in any process (SQLite has one writer anyway; PostgreSQL takes an advisory lock until the commit).
        """
        with _translated():
            if not self.is_sqlite:
                async with self._engine.begin() as connection:
                    if exclusive is not None:
                        await self.exclude(connection, exclusive)
                    yield connection
                return
            async with self._writer, self._engine.connect() as connection:
                await connection.execution_options(immediate=True)
                async with connection.begin():
                    yield connection

    async def exclude(self, connection: AsyncConnection, name: str) -> None:
        """Exclude transactions of the same name from this point of a write transaction on, as `exclusive` does."""
        if not self.is_sqlite:
            await connection.execute(_ADVISORY_LOCK, {"name": name})

    @contextlib.asynccontextmanager
    async def write_one(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection for exactly one statement, which is its own transaction: the cheapest way to write."""
        if not self.is_sqlite:
            async with self.write() as connection:
                yield connection
            return
        with _translated():
            async with self._writer, self._engine.connect() as connection:
                yield connection

    async def erase_deleted(self, *, wait: float = SQLITE_BUSY_SECONDS) -> bool:
        """Remove deleted rows from the store's file and its log (SQLite).

        Waits at most `wait` seconds for readers, and blocks writers meanwhile. Returns False if the wait timed out.
        """
        if not self.is_sqlite:
            return True
        async with self.read() as connection:
            await connection.commit()
            await connection.exec_driver_sql(f"PRAGMA busy_timeout={round(wait * 1000)}")
            try:
                row = (await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")).one()
            finally:
                await connection.exec_driver_sql(f"PRAGMA busy_timeout={SQLITE_BUSY_SECONDS * 1000}")
        return bool(row[0] == 0)

    async def check(self) -> None:
        """Raise Unavailable if the store does not answer."""
        async with self.read() as connection:
            await connection.execute(text("SELECT 1"))

    async def check_writes(self) -> None:
        """Raise Unavailable if the store does not accept a write of a turn's size: a full disk can still be read."""
        padding = base64.b64encode(os.urandom(_CHECK_BYTES)).decode()  # random, or PostgreSQL would compress it
        async with self.write_one() as connection:
            await connection.execute(_CHECK, {"value": f'"{padding}"', "now": time.time()})

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


def _make_private(path: Path) -> None:
    """Create the database's file, if it is missing, readable only by this user; SQLite gives its log the same mode.

    If that fails, the first statement reports it, as any other disk failure.
    """
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _sqlite_engine(url: str) -> AsyncEngine:
    engine = create_async_engine(
        make_url(url).set(drivername=DRIVER),
        poolclass=AsyncAdaptedQueuePool,
        pool_size=5,
        max_overflow=0,
        connect_args={"timeout": SQLITE_BUSY_SECONDS, "check_same_thread": False},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # turns off the driver's BEGIN; `begin` below chooses the kind
        cursor = connection.cursor()
        _enable_wal(cursor)
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        if connection.get_execution_options().get("immediate", False):
            begin_with_next(connection)

    return engine


def _enable_wal(cursor: Any) -> None:
    """Turn on SQLite's write-ahead log, with a retry.

    Only the first connection to a new file changes the mode; meanwhile SQLite rejects other connections immediately,
    without the busy timeout of other statements.
    """
    deadline = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            await_(asyncio.sleep(0.02))
        else:
            return


@contextlib.contextmanager
def _translated() -> Any:
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, sqlite3.Error, TimeoutError) as error:
        original = getattr(error, "orig", None) or error
        _log.error("store.failed", error=str(original)[:300])
        raise Unavailable("the store does not answer; try again, and check the server's log") from error
