"""The operator's commands on a real store and key file: keys come, are re-wrapped and go for good; tokens too."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hypercore_agents.security.bearers import digest
from hypercore_agents.security.sealing import KeyRing, Sealer, SealingError
from hypercore_agents.store import bearers, keys
from hypercore_agents.store.database import Database, sqlite_url

CANARY = "sk-ant-canary-5d0f7c3e9a1b4468"


def run(state: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "HOME")} | {
        "STATE_DIR": str(state)
    }
    return subprocess.run(
        [sys.executable, "-m", "hypercore_agents", *arguments],
        env=environment, input=given, capture_output=True, text=True, timeout=60, check=False, cwd=state.parent,
    )  # fmt: skip


def sealed_key(state: Path, owner: str) -> bytes | None:
    async def look() -> bytes | None:
        database = Database(sqlite_url(state / "store.db"))
        async with database.read() as connection:
            row = await keys.first_key(connection, [owner])
        await database.close()
        return None if row is None else row.sealed

    return asyncio.run(look())


def test_a_key_is_stored_sealed_rotated_and_removed_for_good(tmp_path: Path) -> None:
    state = tmp_path / "state"
    added = run(state, "keys", "add", "ada", given=f"{CANARY}\n")
    assert added.returncode == 0, added.stderr
    before, ring = sealed_key(state, "user:ada"), KeyRing.load(state / "keys.json")
    assert before is not None
    assert Sealer(ring).open(before, "user:ada") == CANARY

    rotated = run(state, "keys", "rotate")
    assert rotated.returncode == 0, rotated.stderr
    assert "re-wrapped 1 secrets" in rotated.stdout
    after, new_ring = sealed_key(state, "user:ada"), KeyRing.load(state / "keys.json")
    assert after is not None
    assert new_ring.primary != ring.primary
    assert set(new_ring.keys) == {new_ring.primary, ring.primary}
    assert Sealer(new_ring.keeping()).open(after, "user:ada") == CANARY
    with pytest.raises(SealingError):
        Sealer(ring).open(after, "user:ada")
    assert "dropped 1 retired" in run(state, "keys", "prune").stdout
    assert set(KeyRing.load(state / "keys.json").keys) == {new_ring.primary}

    assert "user:ada" in run(state, "keys", "list").stdout
    assert run(state, "keys", "remove", "ada").returncode == 0
    assert run(state, "keys", "remove", "ada").returncode == 2
    left = b"".join(path.read_bytes() for path in state.iterdir() if path.is_file())
    assert after not in left, "the removed key can still be read in the store's files"
    assert CANARY.encode() not in left
    assert CANARY not in added.stdout + added.stderr


@pytest.mark.parametrize("given", ["", "short", "has spaces in it", "ключ-длинный-достаточно"])
def test_a_key_that_is_none_is_refused_without_quoting_it(tmp_path: Path, given: str) -> None:
    refused = run(tmp_path / "state", "keys", "add", "ada", given=f"{given}\n")
    assert refused.returncode == 2
    assert "8 to 512" in refused.stderr
    assert not given or given not in refused.stderr


def test_a_key_needs_an_owner(tmp_path: Path) -> None:
    for arguments in (("add",), ("add", "ada", "--platform")):
        refused = run(tmp_path / "state", "keys", *arguments, given=f"{CANARY}\n")
        assert refused.returncode == 2
        assert "whose key" in refused.stderr


def test_a_token_is_shown_once_stored_as_digest_and_revoked(tmp_path: Path) -> None:
    state = tmp_path / "state"
    made = run(state, "tokens", "create", "ci", "--scope", "user", "--user", "ada", "--days", "3")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)

    async def look() -> bearers.BearerRow | None:
        database = Database(sqlite_url(state / "store.db"))
        async with database.read() as connection:
            row = await bearers.get_bearer(connection, digest(token))
        await database.close()
        return row

    row = asyncio.run(look())
    assert row is not None
    assert (row.scope, row.user_id) == ("user", "ada")
    assert row.expires_at is not None
    assert round(row.expires_at - row.created_at) == 3 * 86400
    assert run(state, "tokens", "create", "ci", "--scope", "admin").returncode == 2
    listed = run(state, "tokens", "list").stdout
    assert "ci\tuser\tada" in listed
    assert token not in listed
    assert run(state, "tokens", "revoke", "ci").returncode == 0
    assert asyncio.run(look()) is None


def test_a_user_token_needs_a_user(tmp_path: Path) -> None:
    for arguments in (("--scope", "user"), ("--scope", "admin", "--user", "ada")):
        assert "--user" in run(tmp_path / "state", "tokens", "create", "x", *arguments).stderr


@pytest.mark.parametrize("role", ["manager", "gateway", "autoscaler"])
def test_a_bad_value_in_env_file_ends_a_role_with_one_line_that_names_it(tmp_path: Path, role: str) -> None:
    (tmp_path / ".env").write_text("LOG_LEVEL=loud\n")
    refused = run(tmp_path / "state", role)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "hypercore-agents: LOG_LEVEL: Input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"
    ]
