"""Stores for tests: a new SQLite file, or a new database in a real PostgreSQL server that the tests start.

The server starts once per run, on a Unix socket in a temporary folder (no TCP port), with durability off. Without
PostgreSQL, the tests that need it are skipped with that reason.
"""

import asyncio
import contextlib
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return found[-1].parent if found else None


def _run(command: list[str], owner: str | None) -> None:
    subprocess.run(command, user=owner, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[Path]:
    """The socket folder of a running PostgreSQL server."""
    with postgres_server() as folder:
        yield folder


@contextlib.contextmanager
def postgres_server(data: Path | None = None) -> Iterator[Path]:
    """Run a PostgreSQL server and yield its socket folder. `data`: folder of its tables (not of its log)."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    owner = None  # the server refuses to run as root
    if os.getuid() == 0:
        owner = "postgres"
        try:
            pwd.getpwnam(owner)
        except KeyError:
            pytest.skip("there is no user 'postgres' to run PostgreSQL as")
    folder = Path(tempfile.mkdtemp(prefix="hypercore-pg-", dir="/tmp"))
    try:
        if owner:
            shutil.chown(folder, owner)
        tables = data or folder / "data"
        init = [str(programs / "initdb"), "-D", str(tables), "-U", "test", "-A", "trust", "--no-sync"]
        _run([*init, "--waldir", str(folder / "wal")], owner)
        settings = f"-F -k {folder} -c listen_addresses='' -c max_connections=200"
        start = [str(programs / "pg_ctl"), "-D", str(tables), "-o", settings, "-l", str(folder / "log"), "-w", "start"]
        _run(start, owner)
        try:
            yield folder
        finally:
            _run([str(programs / "pg_ctl"), "-D", str(tables), "-m", "immediate", "-w", "stop"], owner)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def stopped(folder: Path) -> Iterator[None]:
    """Stop the server in this folder, and start it again afterwards."""
    programs = _programs()
    assert programs is not None
    control = [str(programs / "pg_ctl"), "-D", str(folder / "data"), "-w", "-m", "fast"]
    owner = "postgres" if folder.owner() == "postgres" else None
    options = (folder / "data/postmaster.opts").read_text().split(" ", 1)[1].strip().replace('"', "")
    _run([*control, "stop"], owner)
    try:
        yield
    finally:
        _run([*control[:-2], "-o", options, "-l", str(folder / "log"), "start"], owner)


@contextlib.contextmanager
def postgres_database(folder: Path) -> Iterator[str]:
    """Yield the URL of a new, empty database; drop it afterwards."""
    name = f"t{secrets.token_hex(6)}"
    with psycopg.connect(host=str(folder), user="test", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type, unused-ignore]
        try:
            yield f"postgresql+psycopg://test@/{name}?host={folder}"
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type, unused-ignore]


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store, for each kind of database."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "store.db")
    else:
        with postgres_database(request.getfixturevalue("postgres_socket")) as url:
            yield url


@pytest_asyncio.fixture
async def database(store_url: str) -> AsyncIterator[Database]:
    """A migrated store, for each kind of database."""
    database = Database(store_url)
    await migrate(database)
    yield database
    await database.close()
    await asyncio.sleep(0)
