"""The operator's commands for keys, tokens and settings on a real store and key file."""

import asyncio
import re
import socket
from pathlib import Path

import pytest

from hypercore_agents.cli.ownership import holding
from hypercore_agents.security.bearers import digest
from hypercore_agents.security.sealing import KeyRing, Sealer, SealingError
from hypercore_agents.store import bearers, keys
from hypercore_agents.store.database import Database, sqlite_url
from support.command_line import Ended, command

CANARY = "sk-ant-canary-5d0f7c3e9a1b4468"


def run(state: Path, *arguments: str, given: str = "") -> Ended:
    return command(*arguments, given=given, STATE_DIR=str(state))


def sealed_key(state: Path, owner: str) -> bytes | None:
    async def look() -> bytes | None:
        database = Database(sqlite_url(state / "store.db"))
        async with database.read() as connection:
            row = await keys.first_key(connection, [owner])
        await database.close()
        return None if row is None else row.sealed

    return asyncio.run(look())


def test_keys_are_stored_sealed_rotated_and_removed_permanently(tmp_path: Path) -> None:
    state = tmp_path / "state"
    added = run(state, "keys", "add", "ada", given=f"{CANARY}\n")
    assert added.code == 0, added.err
    before, ring = sealed_key(state, "user:ada"), KeyRing.load(state / "keys.json")
    assert before is not None
    assert Sealer(ring).open(before, "user:ada") == CANARY

    rotated = run(state, "keys", "rotate")
    assert rotated.code == 0, rotated.err
    assert "re-wrapped 1 secrets" in rotated.out
    after, new_ring = sealed_key(state, "user:ada"), KeyRing.load(state / "keys.json")
    assert after is not None
    assert new_ring.primary != ring.primary
    assert set(new_ring.keys) == {new_ring.primary, ring.primary}
    assert Sealer(new_ring.keeping()).open(after, "user:ada") == CANARY
    with pytest.raises(SealingError):
        Sealer(ring).open(after, "user:ada")
    refused = run(state, "keys", "prune")
    assert refused.code == 2
    assert "may be valid until" in refused.err
    assert set(KeyRing.load(state / "keys.json").keys) == {new_ring.primary, ring.primary}
    assert "deleted 1 retired" in run(state, "keys", "prune", "--force").out
    assert set(KeyRing.load(state / "keys.json").keys) == {new_ring.primary}

    assert "user:ada" in run(state, "keys", "list").out
    assert run(state, "keys", "remove", "ada").code == 0
    assert run(state, "keys", "remove", "ada").code == 2
    stored = b"".join(path.read_bytes() for path in state.iterdir() if path.is_file())
    assert after not in stored, "the removed key can still be read in the store's files"
    assert CANARY.encode() not in stored
    assert CANARY not in added.out + added.err


@pytest.mark.parametrize("given", ["", "short", "has spaces in it", "ключ-длинный-достаточно"])
def test_invalid_keys_are_rejected_without_being_quoted(tmp_path: Path, given: str) -> None:
    refused = run(tmp_path / "state", "keys", "add", "ada", given=f"{given}\n")
    assert refused.code == 2
    assert "8 to 512" in refused.err
    assert not given or given not in refused.err


def test_keys_require_exactly_one_owner(tmp_path: Path) -> None:
    for arguments in (("add",), ("add", "ada", "--platform")):
        refused = run(tmp_path / "state", "keys", *arguments, given=f"{CANARY}\n")
        assert refused.code == 2
        assert "owner of the key" in refused.err


def test_tokens_are_shown_once_stored_as_digests_and_revocable(tmp_path: Path) -> None:
    state = tmp_path / "state"
    made = run(state, "tokens", "create", "ci", "--scope", "user", "--user", "ada", "--days", "3")
    assert made.code == 0, made.err
    token = made.out.strip()
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
    assert run(state, "tokens", "create", "ci", "--scope", "admin").code == 2
    listed = run(state, "tokens", "list").out
    assert re.search(r"ci\s+user\s+ada", listed)
    assert token not in listed
    assert run(state, "tokens", "revoke", "ci").code == 0
    assert asyncio.run(look()) is None


def test_commands_beside_a_running_demo_print_a_notice(tmp_path: Path) -> None:
    state, demo = tmp_path / "state", tmp_path / "state" / "demo"
    demo.mkdir(parents=True)
    with holding(demo, "http://127.0.0.1:8080"):
        beside = run(state, "tokens", "create", "permanent", "--scope", "admin")
        assert (beside.code, f"STATE_DIR={demo}" in beside.err) == (0, True)
        inside = run(demo, "tokens", "create", "temporary", "--scope", "admin")
        assert (inside.code, inside.err) == (0, "")
        assert "temporary" not in run(state, "tokens", "list").out
        with holding(state, "http://127.0.0.1:8081"):
            assert run(state, "tokens", "list").err == ""
    assert run(state, "tokens", "list").err == ""


def test_user_tokens_require_a_user(tmp_path: Path) -> None:
    for arguments in (("--scope", "user"), ("--scope", "admin", "--user", "ada")):
        assert "--user" in run(tmp_path / "state", "tokens", "create", "x", *arguments).err


@pytest.mark.parametrize("role", ["manager", "gateway", "autoscaler"])
def test_invalid_env_file_values_end_a_role_with_one_line(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("LOG_LEVEL=loud\n")
    monkeypatch.chdir(tmp_path)
    refused = run(tmp_path / "state", role)
    assert refused.code == 2
    assert refused.err.splitlines() == [
        "hypercore-agents: LOG_LEVEL: Input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"LOG_LEVEL=INFO\nCLAUDE_MODEL=\xff\xfe\n", "line 2"),
        ("A=1\n".encode("utf-16"), "line 1"),
        (b"A=1\nB=2\0\n", "line 2"),
        (b'A=1\n\nJWT_SECRET="never closed\n', "line 3"),
        (b"these are words\n", "line 1"),
        (b"A=1\nENABLE_AUTH\n", "line 2"),
        (b"=5\n", "line 1"),
    ],
)
def test_unreadable_env_files_are_rejected_with_the_line_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(content)
    for arguments in (("tokens", "list"), ("config", "show"), ("manager",), ("up", "--demo"), ("list",)):
        refused = run(tmp_path / "state", *arguments)
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused
        assert f".env, {line}: " in refused.err
        assert "never closed" not in refused.err


def test_env_files_with_crlf_bom_and_empty_values_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(
        b"\xef\xbb\xbfMAX_AGENTS_PER_USER=7\r\n# nothing\r\nWORKER_COUNT=\r\n"
        b"export LOG_LEVEL=ERROR\r\nMAX_AGENTS_PER_USER=8\r\n"
    )
    shown = run(tmp_path / "state", "config", "show", "--json")
    values = {row["name"]: row["value"] for row in shown.json}
    assert (values["MAX_AGENTS_PER_USER"], values["WORKER_COUNT"], values["LOG_LEVEL"]) == ("8", "1", "ERROR")
    assert "MAX_AGENTS_PER_USER on lines 1 and 5" in shown.err
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()
    assert "is not a file" in run(tmp_path / "state", "config", "show").err


def test_occupied_addresses_are_reported_before_the_start(tmp_path: Path) -> None:
    """Otherwise answers of another program, such as the manager of another deployment, would be mistaken for ours."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        names = ("LISTEN_ADDR", "GATEWAY_ADDR", "AUTOSCALER_ADDR", "SIMULATOR_LISTEN")
        for name in names:
            free: dict[str, str | None] = dict.fromkeys(names, "127.0.0.1:0")
            here = {**free, name: address, "STATE_DIR": str(tmp_path / "state"), "ANTHROPIC_API_KEY": None}
            for how in ([], ["--detach"]):
                refused = command("up", "--demo", "--backend", "process", *how, given="", **here)
                assert refused.code == 2, refused
                assert f"cannot listen on {address}" in refused.err
                assert f"set {name} to a free address" in refused.err


def test_doctor_reports_each_invalid_setting_once(tmp_path: Path) -> None:
    found = command("doctor", "--json", STATE_DIR=str(tmp_path), MIN_AGENTS="ten")
    assert found.code == 1
    wrong = [finding for finding in found.json if finding["state"] == "missing"]
    assert [(finding["name"], finding["found"].partition(":")[0]) for finding in wrong] == [("settings", "MIN_AGENTS")]
