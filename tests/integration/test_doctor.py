"""`doctor` on a platform with one fault: it reports the cause and the remedy, and exits with code 1."""

import asyncio
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import web

from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.manager.store_startup import open_store
from hypercore_agents.store.database import Database
from hypercore_agents.store.schema import migrate
from support.command_line import command
from support.gateway_server import gateway_site
from support.manager_server import aiohttp_served, deployed
from support.store_fixtures import _programs, _run, postgres_server, stopped

PASSWORD = "not-a-real-password"
CLOSED_PORTS = {"LISTEN_ADDR": "127.0.0.1:9", "GATEWAY_ADDR": "127.0.0.1:19"}


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """A PostgreSQL server of this module, which its tests may stop."""
    with postgres_server() as folder:
        yield folder


async def run_doctor(**environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the command; return its exit code and the findings with state `missing`, by name."""
    ended = await asyncio.to_thread(command, "doctor", "--json", **{**CLOSED_PORTS, **environment})
    printed = ended.out[ended.out.index("[\n") :]  # log lines of the test's roles may precede it
    missing: dict[str, dict[str, Any]] = {}
    for finding in json.JSONDecoder().raw_decode(printed)[0]:
        if finding["state"] == "missing":
            more = missing.setdefault(finding["name"], {"found": "", "remedy": ""})
            more["found"] += finding["found"] + "\n"
            more["remedy"] = finding["remedy"]
    return ended.code, missing


@contextlib.asynccontextmanager
async def role_with_wrong_clock(seconds: float) -> AsyncIterator[str]:
    """Serve `/ready` like a role on a machine with a wrong clock; yield the address."""

    async def ready(_: web.Request) -> web.Response:
        return web.json_response({"status": "ready"}, headers={"date": formatdate(time.time() + seconds, usegmt=True)})

    app = web.Application()
    app.router.add_get("/ready", ready)
    async with aiohttp_served(app) as url:
        yield url.removeprefix("http://")


@pytest.mark.parametrize(
    ("seconds", "variables", "said"),
    [
        (1200, ("LISTEN_ADDR", "GATEWAY_ADDR"), "s behind that of the manager"),
        (-1200, ("GATEWAY_ADDR",), "s ahead of that of the gateway"),
    ],
)
async def test_doctor_reports_a_clock_off_by_twenty_minutes(
    tmp_path: Path, seconds: float, variables: tuple[str, ...], said: str
) -> None:
    async with role_with_wrong_clock(seconds) as address:
        code, missing = await run_doctor(STATE_DIR=str(tmp_path), **dict.fromkeys(variables, address))
    assert code == 1
    assert said in missing["clock"]["found"]
    assert "timedatectl" in missing["clock"]["remedy"]


@pytest.mark.postgres
async def test_doctor_reports_a_clock_that_differs_from_postgresql(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql+psycopg://test@/postgres?host={server}"
    code, missing = await run_doctor(STATE_DIR=str(tmp_path), DATABASE_URL=url)
    assert (code, missing) == (0, {})
    monkeypatch.setattr("hypercore_agents.cli.services.time.time", lambda now=time.time: now() - 1200)
    code, missing = await run_doctor(STATE_DIR=str(tmp_path), DATABASE_URL=url)
    assert code == 1
    assert "1200 s behind that of PostgreSQL" in missing["clock"]["found"]


@pytest.mark.root
async def test_doctor_reports_a_full_disk() -> None:
    root = Path(tempfile.mkdtemp(prefix="hypercore-disk-", dir="/tmp"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        root.rmdir()
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        code, missing = await run_doctor(STATE_DIR=str(root))
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)
        root.rmdir()
    assert code == 1
    assert f"MB free on the disk of {root}" in missing["disk"]["found"]
    assert "free some space" in missing["disk"]["remedy"]


@pytest.mark.postgres
async def test_doctor_reports_a_wrong_database_password(server: Path, tmp_path: Path) -> None:
    programs = _programs()
    assert programs is not None
    owner = "postgres" if server.owner() == "postgres" else None
    rules, allowed = server / "data/pg_hba.conf", "local all test trust\nlocal all all scram-sha-256\n"
    before = rules.read_text()
    with psycopg.connect(host=str(server), user="test", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'")  # type: ignore[arg-type, unused-ignore]
        rules.write_text(allowed)
        _run([str(programs / "pg_ctl"), "-D", str(server / "data"), "reload"], owner)
        try:
            right = f"postgresql+psycopg://guarded:{PASSWORD}@/postgres?host={server}"
            assert (await run_doctor(STATE_DIR=str(tmp_path), DATABASE_URL=right))[0] == 0
            wrong = right.replace(PASSWORD, "another-password")
            code, missing = await run_doctor(STATE_DIR=str(tmp_path), DATABASE_URL=wrong)
        finally:
            rules.write_text(before)
            _run([str(programs / "pg_ctl"), "-D", str(server / "data"), "reload"], owner)
            connection.execute("DROP ROLE guarded")
    assert code == 1
    assert "password authentication failed" in missing["database"]["found"]
    assert missing["database"]["remedy"] == "correct user and password in DATABASE_URL"
    assert "another-password" not in str(missing)


@pytest.mark.postgres
async def test_doctor_reports_postgresql_down_behind_a_running_gateway(server: Path, tmp_path: Path) -> None:
    url = f"postgresql+psycopg://test@/postgres?host={server}"
    async with gateway_site(tmp_path, url, "http://127.0.0.1:9") as site:
        given = {
            "STATE_DIR": str(site.settings.state_dir),
            "DATABASE_URL": url,
            "GATEWAY_ADDR": site.url.removeprefix("http://"),
        }
        assert await run_doctor(**given) == (0, {})
        with stopped(server):
            code, missing = 0, dict[str, dict[str, Any]]()
            async with asyncio.timeout(60):  # a gateway caches the state of its store for some seconds
                while "gateway" not in missing:
                    code, missing = await run_doctor(**given)
    assert code == 1
    assert "is not ready: the store does not answer" in missing["gateway"]["found"]
    assert "store-unavailable" in missing["gateway"]["remedy"]
    assert "start PostgreSQL" in missing["database"]["remedy"]


async def test_doctor_reports_a_gateway_down_beside_a_running_manager(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state") as site:
        address = site.url.removeprefix("http://")
        code, missing = await run_doctor(STATE_DIR=str(tmp_path / "state"), LISTEN_ADDR=address)
    assert code == 1
    assert "nothing answers at http://127.0.0.1:19, but a manager is running" in missing["gateway"]["found"]
    assert "hypercore-agents gateway" in missing["gateway"]["remedy"]
    assert "cannot be reached" in missing["manager's gateway"]["found"]


async def test_doctor_reports_a_newer_store_and_a_foreign_key_ring(tmp_path: Path) -> None:
    state, copy = tmp_path / "state", tmp_path / "copy"
    settings = ManagerSettings(_env_file=None, state_dir=state)
    await open_store(settings)
    assert await run_doctor(STATE_DIR=str(state)) == (0, {})
    copy.mkdir()
    code, missing = await run_doctor(STATE_DIR=str(copy), DATABASE_URL=settings.store_url)
    assert code == 1
    assert str(state / "keys.json") in missing["key ring"]["found"]
    assert f"STATE_DIR={state}" in missing["store owner"]["found"]
    database = Database(settings.store_url)
    await migrate(database)
    async with database.write() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    await database.close()
    code, missing = await run_doctor(STATE_DIR=str(state))
    assert code == 1
    assert "written by a newer version" in missing["database"]["found"]


async def test_doctor_reports_a_blob_store_that_denies_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.s3_server import s3

    async with s3() as store:
        for name, value in store.environment(AWS_ACCESS_KEY_ID="AKIAWRONGWRONGWRONG0").items():
            monkeypatch.setenv(name, value)
        code, missing = await run_doctor(STATE_DIR=str(tmp_path))
    assert code == 1
    assert "InvalidAccessKeyId" in missing["blob store"]["found"]
    assert "blobs-unavailable" in missing["blob store"]["remedy"]
