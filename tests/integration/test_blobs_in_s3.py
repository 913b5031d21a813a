"""Workspace archives in S3 over HTTP: the check at start, moves from a folder, and failures."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.manager.store_startup import open_store
from hypercore_agents.store import blobs
from hypercore_agents.store.blobs import Blobs, BlobUrlError
from hypercore_agents.store.database import Database
from hypercore_agents.store.workspaces import WorkspaceRow, put_workspace
from support.command_line import command
from support.s3_server import BUCKET, S3, s3


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 100_000):
        yield content[start : start + 100_000]


def configure(monkeypatch: pytest.MonkeyPatch, store: S3, **more: str) -> None:
    for name, value in store.environment(**more).items():
        monkeypatch.setenv(name, value)


async def test_an_archive_is_stored_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with s3() as store:
        configure(monkeypatch, store)
        opened = Blobs(f"s3://{BUCKET}/some/prefix", tmp_path)
        await opened.require()
        assert store.objects == {}, "the check leaves no object"
        content = b"archive" * 2_000_000
        digest = hashlib.sha256(content).hexdigest()
        assert await opened.put("owner", pieces(content), limit=1 << 30) == (digest, len(content))
        assert set(store.objects) == {f"some/prefix/workspaces/owner/{digest}"}
        assert b"".join([chunk async for chunk in opened.get("owner", digest)]) == content
        assert await opened.has("owner", digest)
        await opened.delete("owner", digest)
        assert not await opened.has("owner", digest)


async def test_variables_are_read_from_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with s3() as store:
        monkeypatch.chdir(tmp_path)
        (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in store.environment().items()))
        await Blobs(f"s3://{BUCKET}", tmp_path).check()
        assert store.requests == 3


@pytest.mark.parametrize(
    ("url", "more", "said"),
    [
        (f"s3://{BUCKET}", {"AWS_ACCESS_KEY_ID": "AKIAWRONGWRONGWRONG0"}, "InvalidAccessKeyId"),
        ("s3://another-bucket", {}, "NoSuchBucket"),
    ],
)
async def test_a_rejection_fails_the_start_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, more: dict[str, str], said: str
) -> None:
    async with s3() as store:
        configure(monkeypatch, store, **more)
        with pytest.raises(BlobUrlError, match="BLOB_URL") as refused:
            await Blobs(url, tmp_path).require()
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)


async def test_an_unavailable_store_does_not_fail_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "_PROBE_SECONDS", 1.0)
    async with s3() as store:
        configure(monkeypatch, store)
        store.status = 503
        opened = Blobs(f"s3://{BUCKET}", tmp_path)
        await opened.require()
        with pytest.raises(Unavailable, match="does not accept a test object"):
            await opened.check()
        store.status = None
        await opened.check()


async def test_archives_move_and_missing_ones_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    settings = ManagerSettings(_env_file=None, state_dir=state)
    await open_store(settings)
    before, database = Blobs(None, state / "blobs"), Database(settings.store_url)
    contents = [f"archive {number}".encode() for number in range(3)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    for content, digest in zip(contents, digests, strict=True):
        await before.put("owner", pieces(content), limit=1000, digest=digest)
    async with database.write() as connection:
        for number, digest in enumerate([*digests, "0" * 64]):
            await put_workspace(connection, WorkspaceRow(f"session-{number}", "owner", digest, 9), now=1.0)
    await database.close()
    async with s3() as store:
        configure(monkeypatch, store, STATE_DIR=str(state))
        store.status = 503
        failed = await asyncio.to_thread(command, "blobs", "move")
        assert failed.code == 2
        assert "run the command again" in failed.err
        store.status = None
        moved = await asyncio.to_thread(command, "blobs", "move", "--json")
        assert moved.code == 1, "one archive is in neither store"
        assert moved.json == {"copied": 3, "present": 0, "missing_sessions": ["session-3"]}
        assert {name.rpartition("/")[2] for name in store.objects} == set(digests)
        again = await asyncio.to_thread(command, "blobs", "move", "--delete", "--json")
        assert again.json == {"copied": 0, "present": 3, "missing_sessions": ["session-3"]}
        assert not await before.has("owner", digests[0])


async def test_a_move_within_one_store_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, content = tmp_path / "state", b"the only copy"
    settings = ManagerSettings(_env_file=None, state_dir=state)
    await open_store(settings)
    blobs, database = Blobs(None, state / "blobs"), Database(settings.store_url)
    stored = await blobs.put("owner", pieces(content), limit=1000)
    async with database.write() as connection:
        await put_workspace(connection, WorkspaceRow("session", "owner", stored.digest, stored.size), now=1.0)
    await database.close()
    (tmp_path / "link").symlink_to(state / "blobs")
    monkeypatch.setenv("STATE_DIR", str(state))
    monkeypatch.setenv("BLOB_URL", f"file://{tmp_path}/link")
    moved = await asyncio.to_thread(command, "blobs", "move", "--delete")
    assert moved.code == 2
    assert "the same store" in moved.err
    assert await blobs.has("owner", stored.digest)


def test_a_move_from_a_missing_folder_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "state"))
    moved = command("blobs", "move", "--from", f"file://{tmp_path}/typo")
    assert moved.code == 2
    assert f"--from: there is no folder {tmp_path}/typo" in moved.err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("url", ["gs://bucket", "az://account/container", "http://127.0.0.1:9000/bucket", "s3://"])
def test_other_stores_are_rejected(tmp_path: Path, url: str) -> None:
    with pytest.raises(BlobUrlError, match="BLOB_URL must be"):
        Blobs(url, tmp_path)
