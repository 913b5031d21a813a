"""A store belongs to one key ring and, with local backends, to one machine and state folder."""

import asyncio
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from hypercore_agents.gateway.settings import GatewaySettings
from hypercore_agents.kit.linux import state_location
from hypercore_agents.kit.linux.state_location import StateLocation
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.manager.store_startup import open_store
from hypercore_agents.security.sealing import KeyRing, Sealer
from hypercore_agents.store import keys
from hypercore_agents.store.database import Database
from hypercore_agents.store.leases import take_lease
from hypercore_agents.store.ownership import KeyRingMismatch, check_key_ring, open_key_ring, stored_state_location
from hypercore_agents.store.schema import migrate
from support.command_line import Ended, command
from support.store_fixtures import postgres_database

WEAK_KEY = "sk-ant-not-a-real-key-0001"


@pytest.fixture
def first(tmp_path: Path, postgres_socket: Path) -> Iterator[ManagerSettings]:
    """The settings of a manager that has opened its store, in PostgreSQL."""
    with postgres_database(postgres_socket) as url:
        settings = ManagerSettings(_env_file=None, state_dir=tmp_path / "first", database_url=url)
        asyncio.run(open_store(settings))
        yield settings


def start(role: str, first: ManagerSettings, **environment: str) -> Ended:
    """Start a role on the first manager's store, until it fails or serves."""
    assert first.database_url is not None
    given = {"DATABASE_URL": first.database_url, "LISTEN_ADDR": "127.0.0.1:0", "GATEWAY_ADDR": "127.0.0.1:0"}
    return command(role, **{**given, "WORKER_COUNT": "1", **environment})


@pytest.mark.parametrize(("role", "workers"), [("manager", "1"), ("manager", "2"), ("gateway", "1")])
def test_a_role_with_another_key_ring_fails_and_creates_none(
    first: ManagerSettings, tmp_path: Path, role: str, workers: str
) -> None:
    second = tmp_path / "second"
    failed = start(role, first, STATE_DIR=str(second), WORKER_COUNT=workers)
    assert failed.code == 2, failed
    (line,) = [line for line in failed.err.splitlines() if line.startswith("hypercore-agents: ")]
    assert "there is no key ring in" in line
    assert str(first.key_path) in line, "the error names the file to copy"
    assert not (second / "keys.json").exists()
    KeyRing.load_or_create(second / "keys.json")
    failed = start(role, first, STATE_DIR=str(second), WORKER_COUNT=workers)
    assert failed.code == 2
    assert "is not this store's" in failed.err


def test_a_second_state_folder_is_rejected(first: ManagerSettings, tmp_path: Path) -> None:
    second = {"STATE_DIR": str(tmp_path / "second"), "KEY_FILE": str(first.key_path)}
    failed = start("manager", first, **second)
    assert failed.code == 2, failed
    assert f"STATE_DIR={first.state_dir.resolve()} on this host, and here STATE_DIR is" in failed.err
    assert "run agents on one machine" in failed.err
    assert "hypercore-agents store adopt" in failed.err


def test_another_host_with_the_same_folder_is_rejected(first: ManagerSettings) -> None:
    with mock.patch.object(state_location, "host_id", return_value="another"):
        failed = start("manager", first, STATE_DIR=str(first.state_dir))
    assert failed.code == 2, failed
    assert "the store belongs to host" in failed.err


def test_a_cloned_machine_with_a_new_folder_is_rejected(first: ManagerSettings) -> None:
    (first.state_dir / "folder-id").write_text("0123456789abcdef")
    failed = start("manager", first, STATE_DIR=str(first.state_dir))
    assert failed.code == 2, failed
    assert "this machine is a clone of that one" in failed.err


def test_a_copied_state_folder_is_rejected(tmp_path: Path) -> None:
    state, copy = tmp_path / "state", tmp_path / "copy"
    asyncio.run(open_store(ManagerSettings(_env_file=None, state_dir=state)))
    shutil.copytree(state, copy)
    failed = command("manager", STATE_DIR=str(copy), LISTEN_ADDR="127.0.0.1:0", WORKER_COUNT="1")
    assert failed.code == 2, failed
    assert f"STATE_DIR={state}" in failed.err


def test_a_gateway_needs_the_key_ring_on_any_machine(first: ManagerSettings, tmp_path: Path) -> None:
    from hypercore_agents.gateway.app import check_at_start

    with mock.patch.object(state_location, "host_id", return_value="another"):
        asyncio.run(
            check_at_start(
                GatewaySettings(
                    _env_file=None,
                    state_dir=tmp_path / "elsewhere",
                    database_url=first.database_url,
                    key_file=first.key_path,
                )
            )
        )


def test_store_adopt_moves_the_platform(first: ManagerSettings, tmp_path: Path) -> None:
    second = {"STATE_DIR": str(tmp_path / "second"), "KEY_FILE": str(first.key_path)}
    assert first.database_url is not None

    async def lease(seconds: float) -> StateLocation | None:
        database = Database(str(first.database_url))
        async with database.write() as connection:
            await take_lease(connection, "reconciler", "m-1", now=time.time(), seconds=seconds)
        found = await stored_state_location(database)
        await database.close()
        return found

    asyncio.run(lease(60))
    failed = command("store", "adopt", DATABASE_URL=first.database_url, **second)
    assert failed.code == 2
    assert "a manager is running on this store" in failed.err
    asyncio.run(lease(-1))
    adopted = command("store", "adopt", DATABASE_URL=first.database_url, **second)
    assert adopted.code == 0, adopted
    found = asyncio.run(lease(-1))
    assert found is not None
    assert found.folder == str(tmp_path / "second")
    assert start("manager", first, STATE_DIR=str(first.state_dir)).code == 2, "it does not move back by itself"


async def test_an_older_store_accepts_the_ring_of_its_secrets(store_url: str, tmp_path: Path) -> None:
    right, wrong = KeyRing.load_or_create(tmp_path / "right"), tmp_path / "wrong"
    database = Database(store_url)
    try:
        await migrate(database)
        async with database.write() as connection:
            await keys.put_key(connection, "platform", Sealer(right).seal(WEAK_KEY, "platform"), now=1.0)
        with pytest.raises(KeyRingMismatch, match="there is no key ring in"):
            await open_key_ring(database, wrong)
        KeyRing.load_or_create(wrong)
        with pytest.raises(KeyRingMismatch, match="is not this store's"):
            await open_key_ring(database, wrong)
        assert await open_key_ring(database, tmp_path / "right") == right
        await check_key_ring(database, right)
        with pytest.raises(KeyRingMismatch):
            await check_key_ring(database, KeyRing.load(wrong))
    finally:
        await database.close()


async def test_roles_that_start_together_share_one_key_ring(store_url: str, tmp_path: Path) -> None:
    databases = [Database(store_url) for _ in range(4)]
    try:
        await migrate(databases[0])
        rings = await asyncio.gather(*(open_key_ring(database, tmp_path / "keys.json") for database in databases))
        assert len({ring.primary for ring in rings}) == 1
    finally:
        for database in databases:
            await database.close()


def test_keys_reset_replaces_a_lost_key_ring(tmp_path: Path) -> None:
    state = {"STATE_DIR": str(tmp_path / "state")}
    assert command("keys", "add", "ada", given=f"{WEAK_KEY}\n", **state).code == 0
    failed = command("keys", "reset", **state)
    assert failed.code == 2
    assert "nothing was deleted" in failed.err
    (tmp_path / "state" / "keys.json").unlink()
    assert command("keys", "add", "eve", given=f"{WEAK_KEY}\n", **state).code == 2
    assert "deleted 1 keys" in command("keys", "reset", **state).out
    assert command("keys", "add", "eve", given=f"{WEAK_KEY}\n", **state).code == 0


def test_a_folder_keeps_its_id_and_a_copy_is_detected(tmp_path: Path) -> None:
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    here = StateLocation.of(folder)
    assert StateLocation.of(tmp_path / "link").difference_from(here) is None
    shutil.copytree(folder, copy)
    assert StateLocation.of(copy).difference_from(here) == "folder"
    assert oct(os.stat(folder / "folder-id").st_mode & 0o022) == "0o0"
    with mock.patch.object(state_location, "host_id", return_value="another"):
        assert StateLocation.of(folder).difference_from(here) == "host"
