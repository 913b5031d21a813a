"""Roles report faults found only at start: a store that denies access, a newer store, a missing backend."""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from support.command_line import command
from support.store_fixtures import postgres_server

SECRET = "secret-in-url"
ROLES = ("manager", "gateway")


@pytest.fixture(scope="module")
def guarded_server() -> Iterator[Path]:
    """A PostgreSQL server that requires passwords."""
    with postgres_server() as folder:
        with psycopg.connect(host=str(folder), user="test", dbname="postgres", autocommit=True) as connection:
            connection.execute("CREATE ROLE app LOGIN PASSWORD 'right'")
        rules = folder / "data" / "pg_hba.conf"
        rules.write_text("local all test trust\nlocal all all scram-sha-256\n")
        with psycopg.connect(host=str(folder), user="test", dbname="postgres", autocommit=True) as connection:
            connection.execute("SELECT pg_reload_conf()")
        yield folder


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.postgres
def test_postgresql_connection_errors_are_one_line(
    guarded_server: Path, tmp_path: Path, role: str, workers: str
) -> None:
    for url, cause in (
        (f"postgresql+psycopg://app:{SECRET}@/postgres?host={guarded_server}", "password authentication failed"),
        (f"postgresql+psycopg://app:{SECRET}@/missing?host={guarded_server}", "password authentication failed"),
        (f"postgresql+psycopg://app:{SECRET}@127.0.0.1:1/postgres", "refused"),
        (f"postgresql+psycopg://app:{SECRET}@/postgres?host=/missing-folder", "No such file or directory"),
    ):
        ended = command(
            role, STATE_DIR=str(tmp_path), DATABASE_URL=url, WORKER_COUNT=workers,
            LISTEN_ADDR="127.0.0.1:0", GATEWAY_ADDR="127.0.0.1:0",
        )  # fmt: skip
        assert ended.code == 2
        said = [line for line in ended.err.splitlines() if line.startswith("hypercore-agents: ")]
        assert len(said) == 1, ended.err
        assert "DATABASE_URL" in said[0]
        assert cause in said[0]
        assert SECRET not in ended.err + ended.out
        assert "Traceback" not in ended.err


@pytest.mark.parametrize("role", ROLES)
def test_a_store_of_a_newer_version_is_rejected(tmp_path: Path, role: str) -> None:
    async def newer() -> None:
        database = Database(sqlite_url(tmp_path / "store.db"))
        await migrate(database)
        async with database.write() as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        await database.close()

    asyncio.run(newer())
    ended = command(role, STATE_DIR=str(tmp_path), LISTEN_ADDR="127.0.0.1:0", GATEWAY_ADDR="127.0.0.1:0")
    assert ended.code == 2
    assert re.search(r"DATABASE_URL: the store has schema 9999, written by a newer version", ended.err)
    assert "Traceback" not in ended.err


def test_workers_end_instead_of_restarting_without_a_backend(tmp_path: Path) -> None:
    environment = {
        **os.environ, "STATE_DIR": str(tmp_path), "LISTEN_ADDR": "127.0.0.1:0", "WORKER_COUNT": "2",
        "COMPUTE_BACKEND": "hypercore",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "hypercore_agents", "manager"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 2, said
    assert "hypercore-agents: compute_backend: hypercore is not part of this release" in said
    assert "Traceback" not in said


def test_a_demo_start_timeout_is_explained_and_keeps_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypercore_agents.cli import detach

    monkeypatch.setattr(detach, "_pool_running", lambda _: 0)
    monkeypatch.setattr(detach, "_POOL_SECONDS", 0.5)
    began = time.time()
    ended = command(
        "up", "--demo", "--detach", "--backend", "process", STATE_DIR=str(tmp_path), ANTHROPIC_API_KEY=None,
        LISTEN_ADDR="127.0.0.1:0", GATEWAY_ADDR="127.0.0.1:0", SIMULATOR_LISTEN="127.0.0.1:0",
        AUTOSCALER_ADDR="127.0.0.1:0", MIN_AGENTS="1",
    )  # fmt: skip
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert "the platform did not start" in ended.err
    log = tmp_path / "demo-up.log"
    assert str(log) in ended.err
    assert log.stat().st_mtime >= began - 1
    assert not (tmp_path / "demo").exists()
