"""Transcripts, events and workspace archives over real HTTP, on SQLite and PostgreSQL, with a folder of blobs."""

import asyncio
import hashlib
import io
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import pytest_asyncio
from sqlalchemy import update

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.manager.sessions.purge import Purge
from hypercore_agents.store import events, stored_bytes, workspaces
from hypercore_agents.store.blobs import Blobs, owner_of
from hypercore_agents.store.ledger import LedgerEntry, add_entry
from hypercore_agents.store.sessions import end_session
from hypercore_agents.store.tables import sessions, transcript_sizes
from hypercore_agents.store.transcripts import PAGE_ENTRIES
from hypercore_agents.store.unused_blobs import SWEEP_AFTER
from support.folders_in_use import files_below
from support.gateway_server import DEDICATED, POOL, Site, gateway_site
from support.s3_server import s3


@pytest_asyncio.fixture
async def site(tmp_path: Path, store_url: str) -> AsyncIterator[Site]:
    async with gateway_site(tmp_path, store_url, "http://127.0.0.1:9", workspace_max_mb=1, transcript_max_mb=1) as site:
        yield site


async def append(
    site: Site, session_id: str, *entries: tuple[str, str], generation: int = 1, token: str | None = None
) -> int:
    body = {"generation": generation, "entries": [{"uuid": name, "line": line} for name, line in entries]}
    path = f"{site.url}/internal/sessions/{session_id}/transcript"
    headers = {"authorization": f"Bearer {token or site.agent_token()}"}
    async with site.http.post(path, json=body, headers=headers) as answer:
        return answer.status


async def load(site: Site, session_id: str, *, generation: int = 1, after: int | None = 0) -> tuple[int, Any]:
    path = f"{site.url}/internal/sessions/{session_id}/transcript?generation={generation}"
    path += "" if after is None else f"&after={after}"
    async with site.http.get(path, headers={"authorization": f"Bearer {site.agent_token()}"}) as answer:
        return answer.status, await answer.json()


async def put(site: Site, session_id: str, content: bytes, *, digest: str = "", generation: int = 1) -> int:
    digest = digest or hashlib.sha256(content).hexdigest()
    path = f"{site.url}/internal/sessions/{session_id}/workspaces/{digest}?generation={generation}"
    headers = {"authorization": f"Bearer {site.agent_token()}"}
    async with site.http.put(path, data=io.BytesIO(content), headers=headers) as answer:
        return answer.status


async def get(site: Site, session_id: str, digest: str) -> tuple[int, bytes]:
    path = f"{site.url}/internal/sessions/{session_id}/workspaces/{digest}?generation=1"
    async with site.http.get(path, headers={"authorization": f"Bearer {site.agent_token()}"}) as answer:
        return answer.status, await answer.read()


async def move_on(site: Site, session_id: str) -> None:
    async with site.database.write() as connection:
        await connection.execute(update(sessions).where(sessions.c.session_id == session_id).values(generation=2))


def blobs_in(folder: Path) -> list[Path]:
    """Return the files of the blob store, without the temporary ones of its health check."""
    return [path for path in files_below(folder / "state/blobs") if not path.name.startswith("probe-")]


async def test_entries_are_stored_once_and_in_order(site: Site) -> None:
    session_id = await site.session()
    assert await append(site, session_id, ("b", '{"n": 1}'), ("a", '{"n": 2}')) == 200
    assert await append(site, session_id, ("a", '{"n": 3}'), ("c", '{"n": 4}'), ("c", '{"n": 5}')) == 200
    status, found = await load(site, session_id)
    assert (status, found["workspace"]) == (200, None)
    assert [entry["line"] for entry in found["entries"]] == ['{"n": 1}', '{"n": 2}', '{"n": 4}']


async def test_transcripts_of_empty_entries_are_limited(site: Site) -> None:
    session_id, other = await site.session(), await site.session()
    assert await append(site, session_id, ("a", "x" * 1_000_000)) == 200
    assert await append(site, session_id, ("b", "{}"), ("c", "y" * 100_000)) == 413
    assert await append(site, session_id, ("a", "x" * 1_000_000), ("d", "{}")) == 200, "stored entries count once"
    for number in range(4):
        many = [(f"{number}.{entry}", "") for entry in range(1000)]
        assert await append(site, other, *many) == 200
    assert await append(site, other, *((f"5.{entry}", "") for entry in range(1000))) == 413
    assert [entry["uuid"] for entry in (await load(site, session_id))[1]["entries"]] == ["a", "d"]
    async with site.database.write() as connection:  # as before sizes were counted
        await connection.execute(transcript_sizes.delete())
    assert await append(site, session_id, ("e", "z" * 100_000)) == 413
    # it is read in pages
    status, page = await load(site, other)
    names = [entry["uuid"] for entry in page["entries"]]
    while page["next"] is not None:
        status, page = await load(site, other, after=page["next"])
        assert (status, 0 < len(page["entries"]) <= PAGE_ENTRIES) == (200, True)
        names += [entry["uuid"] for entry in page["entries"]]
    assert names == [f"{number}.{entry}" for number in range(4) for entry in range(1000)]
    _, whole = await load(site, other, after=None)
    assert ([entry["uuid"] for entry in whole["entries"]], whole["next"]) == (names, None), "older agents read no pages"


async def test_the_last_append_returns_the_turns_usage(site: Site) -> None:
    session_id = await site.session()
    spent = LedgerEntry(0.0, "ada", POOL, session_id, 2, "claude", 10, 7, 0, 0, 1, "complete")
    async with site.database.write() as connection:
        await add_entry(connection, spent)
    end = {"generation": 1, "sequence": 1, "name": "result", "data": '{"turn":2,"usage":{}}'}
    body = {"generation": 1, "entries": [{"uuid": "a", "line": "{}"}]}
    path = f"{site.url}/internal/sessions/{session_id}/transcript"
    used = []
    for turn in (None, 1, 2):
        headers = {"authorization": f"Bearer {site.agent_token()}"}
        async with site.http.post(
            path, json={**body, "turn": turn, "events": [end] * (turn == 2)}, headers=headers
        ) as answer:
            used.append((await answer.json())["usage"])
    assert used[0] is None
    assert [usage["output_tokens"] for usage in used[1:]] == [0, 7]
    (found,) = (await log(site, session_id))["events"]
    assert found["data"] == {"turn": 2, "usage": used[2]}, "the result in the log has the usage"


async def test_an_agent_that_hung_cannot_overwrite_its_successor(site: Site) -> None:
    session_id = await site.session()
    assert await append(site, session_id, ("a", "{}")) == 200
    assert await put(site, session_id, b"old") == 204
    await move_on(site, session_id)
    assert await append(site, session_id, ("b", "{}")) == 409
    assert await put(site, session_id, b"new") == 409
    assert (await load(site, session_id))[0] == 409
    status, found = await load(site, session_id, generation=2)
    assert (status, [entry["uuid"] for entry in found["entries"]]) == (200, ["a"])
    assert found["workspace"] == hashlib.sha256(b"old").hexdigest()


async def test_other_agents_and_session_tokens_are_rejected(site: Site) -> None:
    session_id = await site.session()
    assert await append(site, session_id, ("a", "{}"), token=site.agent_token(DEDICATED)) == 404
    assert await append(site, session_id, ("a", "{}"), token=site.token(session_id)) == 401


async def test_a_lost_archive_is_a_permanent_error(site: Site, tmp_path: Path) -> None:
    session_id, digest = await site.session(), hashlib.sha256(b"files").hexdigest()
    assert await put(site, session_id, b"files") == 204
    for path in blobs_in(tmp_path):
        path.unlink()
    status, body = await get(site, session_id, digest)
    error = json.loads(body)["error"]
    assert (status, error["retryable"]) == (410, False)
    assert "hypercore-agents blobs move" in error["message"]


async def test_a_workspace_is_stored_by_its_content(site: Site, tmp_path: Path) -> None:
    first, second = await site.session(), await site.session()
    digest = hashlib.sha256(b"files").hexdigest()
    assert await put(site, first, b"files") == 204
    assert await put(site, second, b"files") == 204
    assert await get(site, first, digest) == (200, b"files")
    assert len(blobs_in(tmp_path)) == 1
    assert await put(site, first, b"other files") == 204
    assert (await get(site, first, digest))[0] == 404
    assert await get(site, second, digest) == (200, b"files")
    assert await put(site, second, b"other files") == 204
    assert len(blobs_in(tmp_path)) == 1  # no archive is deleted


async def test_wrong_or_too_large_archives_leave_no_blob(site: Site, tmp_path: Path) -> None:
    session_id = await site.session()
    assert await put(site, session_id, b"files", digest="0" * 64) == 400
    assert await put(site, session_id, b"x" * (2**20 + 2**18)) == 413, "slightly more than the maximum"
    assert (await load(site, session_id))[1]["workspace"] is None
    assert blobs_in(tmp_path) == []


async def test_a_users_archives_are_limited_and_freed(tmp_path: Path, store_url: str) -> None:
    half = 600_000
    async with gateway_site(tmp_path, store_url, "http://127.0.0.1:9", workspace_max_mb=1, user_storage_mb=1) as site:
        first, second, other = await site.session(), await site.session(), await site.session(user_id="bob")
        for _ in range(3):  # each replaces the previous one
            assert await put(site, first, os.urandom(half)) == 204
            assert [path.stat().st_size for path in blobs_in(tmp_path)] == [half]
        shared = os.urandom(half)
        assert await put(site, second, shared) == 413
        path = f"{site.url}/internal/sessions/{second}/workspace?generation=1"
        headers = {"authorization": f"Bearer {site.agent_token()}"}
        async with site.http.put(path, data=shared, headers=headers) as answer:
            assert (answer.status, "USER_STORAGE_MB" in await answer.text()) == (413, True)
        assert len(blobs_in(tmp_path)) == 1, "a rejected archive is not stored"
        assert await put(site, other, shared) == 204, "other users have their own limit"
        assert await put(site, first, shared) == 204
        assert await put(site, second, shared) == 204, "the same content counts once"
        assert await put(site, first, b"small") == 204
        assert await put(site, second, os.urandom(half)) == 204

        async with site.database.read() as connection:
            shown = await stored_bytes.most_stored(connection, limit=20)
        assert shown == {"ada": half + len(b"small"), "bob": half}
        await site.end(first)
        await site.end(other)
        await sweep(site, Blobs(None, tmp_path / "state/blobs"), later=0)
        async with site.database.read() as connection:
            assert await stored_bytes.most_stored(connection, limit=20) == {"ada": half}
            assert await stored_bytes.stored_of(connection, owner_of("bob")) == 0


async def test_data_of_ended_sessions_is_deleted(site: Site, tmp_path: Path) -> None:
    over, old, living = await site.session(), await site.session(), await site.session()
    for number, session_id in enumerate((over, old, living)):
        assert await append(site, session_id, ("a", "{}")) == 200
        assert await put(site, session_id, b"files" if number else b"shared") == 204
    blobs = Blobs(None, tmp_path / "state/blobs")
    purge = Purge(site.database, blobs, ttl=100, leads=lambda: True, clock=lambda: 1_000.0)
    async with site.database.write() as connection:
        await connection.execute(update(sessions).values(last_used_at=950.0))
        await connection.execute(update(sessions).where(sessions.c.session_id == old).values(last_used_at=850.0))
        await end_session(connection, over, now=990.0)
    await purge.run_once()
    async with site.database.read() as connection:
        assert await workspaces.ended_with_data(connection) == []
        assert await workspaces.get_workspace(connection, old) is None
    assert [path.name for path in blobs_in(tmp_path)] == [hashlib.sha256(b"files").hexdigest()]
    assert (await load(site, living))[1]["workspace"] is not None
    assert not await blobs.has(owner_of("ada"), hashlib.sha256(b"shared").hexdigest())


class _Died(Exception):
    """Simulates the death of the process at this point."""


def dies(*_: Any, **__: Any) -> Any:
    raise _Died


async def sweep(site: Site, blobs: Blobs, *, later: float) -> None:
    purge = Purge(site.database, blobs, ttl=0, leads=lambda: True, clock=lambda: time.time() + later)
    await purge.run_once()


@pytest.mark.parametrize("point", ["get_workspace", "put_workspace"])
async def test_a_blob_of_a_dead_gateway_is_deleted(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    session_id = await site.session()
    with monkeypatch.context() as context:
        context.setattr(workspaces, point, dies)
        assert await put(site, session_id, b"files") == 500
    assert len(blobs_in(tmp_path)) == 1
    blobs = Blobs(None, tmp_path / "state/blobs")
    await sweep(site, blobs, later=0)
    assert len(blobs_in(tmp_path)) == 1, "it may still be recorded"
    await sweep(site, blobs, later=SWEEP_AFTER + 60)
    assert blobs_in(tmp_path) == []
    assert await put(site, session_id, b"files") == 204, "the agent sends it again"
    await sweep(site, blobs, later=SWEEP_AFTER + 60)
    assert len(blobs_in(tmp_path)) == 1, "a blob in use is not deleted"


@pytest.mark.parametrize("failure", [_Died(), Unavailable("the blob store does not answer")])
async def test_deletion_of_a_replaced_blob_is_retried(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    session_id, blobs = await site.session(), Blobs(None, tmp_path / "state/blobs")

    async def fails(*_: Any) -> None:
        raise failure

    assert await put(site, session_id, b"old") == 204
    with monkeypatch.context() as context:
        context.setattr(Blobs, "delete", fails)
        assert await put(site, session_id, b"new") == (500 if isinstance(failure, _Died) else 204)
        assert len(blobs_in(tmp_path)) == 2
        if not isinstance(failure, _Died):
            await sweep(site, blobs, later=SWEEP_AFTER + 60)
            assert len(blobs_in(tmp_path)) == 2
    await sweep(site, blobs, later=2 * SWEEP_AFTER + 120)
    assert [path.name for path in blobs_in(tmp_path)] == [hashlib.sha256(b"new").hexdigest()]


async def test_deletion_of_an_ended_sessions_blob_is_retried(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id, blobs = await site.session(), Blobs(None, tmp_path / "state/blobs")
    assert await put(site, session_id, b"files") == 204
    await site.end(session_id)
    purge = Purge(site.database, blobs, ttl=0, leads=lambda: True, clock=time.time)
    with monkeypatch.context() as context:
        context.setattr(Blobs, "delete", dies)
        with pytest.raises(_Died):
            await purge.purge(session_id)
    assert len(blobs_in(tmp_path)) == 1
    await sweep(site, blobs, later=SWEEP_AFTER + 60)
    assert blobs_in(tmp_path) == []


@pytest_asyncio.fixture(params=["folder", "s3"])
async def blob_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str | None]:
    """The blob store: a folder (None) or a small S3."""
    if request.param == "folder":
        yield None
        return
    async with s3() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        yield store.environment()["BLOB_URL"]


async def test_old_incomplete_uploads_are_deleted(tmp_path: Path, blob_url: str | None) -> None:
    url, blobs = blob_url, Blobs(blob_url, tmp_path)
    reading: asyncio.Event = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"x" * 2**24
        reading.set()
        await asyncio.Event().wait()

    async def one(content: bytes) -> AsyncIterator[bytes]:
        yield content

    digest = hashlib.sha256(b"whole").hexdigest()
    await blobs.put("ada", one(b"whole"), limit=100)
    upload = asyncio.create_task(blobs.put("ada", endless(), limit=2**30))
    await reading.wait()
    if url is None:
        [begun] = (tmp_path / "incoming").iterdir()
        assert await blobs.sweep(60) == 0, "the upload may still be running"
        left = begun.with_name(f"left{begun.name[4:]}")  # as a killed gateway leaves it
        left.write_bytes(b"x")
        os.utime(left, (1, 1))
        assert await blobs.sweep(60) == 1
        assert [*(tmp_path / "incoming").iterdir()] == [begun]
    else:
        await obstore.put_async(blobs._store, "incoming/left", b"x")
        assert await blobs.sweep(60) == 0
        assert await blobs.sweep(-60) == 1
        assert await blobs.sweep(-60) == 0
    assert await blobs.has("ada", digest)
    upload.cancel()
    await asyncio.wait((upload,))


async def send_events(site: Site, session_id: str, *events: tuple[str, str, str], generation: int = 1) -> int:
    """Send events, each an id, a name and JSON."""
    values = [
        {"generation": int(event_id.split(".")[0]), "sequence": int(event_id.split(".")[1]), "name": name, "data": data}
        for event_id, name, data in events
    ]
    path = f"{site.url}/internal/sessions/{session_id}/transcript"
    headers = {"authorization": f"Bearer {site.agent_token()}"}
    async with site.http.post(path, json={"generation": generation, "events": values}, headers=headers) as answer:
        return answer.status


async def log(site: Site, session_id: str, *, generation: int = 1, **query: str) -> Any:
    path = f"{site.url}/internal/sessions/{session_id}/events"
    headers = {"authorization": f"Bearer {site.agent_token()}"}
    params = {"generation": str(generation), **query}
    async with site.http.get(path, params=params, headers=headers) as answer:
        return await answer.json()


async def test_events_are_stored_once_with_rising_ids(site: Site) -> None:
    session_id = await site.session()
    assert (
        await send_events(site, session_id, ("1.1", "session", "{}"), ("1.4", "text", '{"text":\n"a\\u2028b"}')) == 200
    )
    assert (
        await send_events(site, session_id, ("1.3", "text", "{}"), ("1.4", "error", "{}"), ("1.6", "result", "{}"))
        == 200
    )
    found = await log(site, session_id)
    assert [(e["id"], e["event"]) for e in found["events"]] == [("1.1", "session"), ("1.4", "text"), ("1.6", "result")]
    assert found["events"][1]["data"] == {"text": "a\u2028b"}
    assert (found["cut"], found["next"]) == (False, None)
    first = await log(site, session_id, limit="2")
    assert ([e["id"] for e in first["events"]], first["next"]) == (["1.1", "1.4"], "1.4")
    assert [e["id"] for e in (await log(site, session_id, after=first["next"]))["events"]] == ["1.6"]
    await move_on(site, session_id)
    assert await send_events(site, session_id, ("1.7", "result", "{}")) == 409
    assert await send_events(site, session_id, ("2.1", "session", "{}"), generation=2) == 200
    assert [e["id"] for e in (await log(site, session_id, generation=2))["events"]][-2:] == ["1.6", "2.1"]
    assert await log(site, session_id, generation=1) != await log(site, session_id, generation=2)


async def test_invalid_events_are_rejected(site: Site) -> None:
    session_id = await site.session()
    for data in ("", "[]", "{", '{"x": NaN}', "[" * 100_000):
        assert await send_events(site, session_id, ("1.1", "result", data)) == 400, data[:20]
    assert await send_events(site, session_id, ("1.1", "delta", "{}")) == 400
    assert await send_events(site, session_id, ("1.1", "result", '{"a": "\0"}')) == 400, "PostgreSQL cannot store it"
    assert await send_events(site, session_id, ("2.1", "result", "{}")) == 400
    assert (await log(site, session_id))["count"] == 0


async def test_a_resuming_agent_receives_the_last_notice(site: Site) -> None:
    session_id = await site.session()
    headers = {"authorization": f"Bearer {site.agent_token()}"}

    async def last() -> dict[str, Any]:
        body = {"session_id": session_id, "generation": 1}
        async with site.http.post(f"{site.url}/internal/session-tokens", json=body, headers=headers) as answer:
            assert answer.status == 200
            return dict((await answer.json())["last_event"])

    for number, (name, data, notice) in enumerate(
        (
            ("notice", '{"text": "a job was ended"}', "a job was ended"),
            ("result", '{"text": "not this"}', None),
            ("notice", "{}", None),
            ("notice", '{"text": [1]}', None),
            ("notice", f'{{"text": "{"x" * 5000}"}}', "x" * 2000),
        ),
        1,
    ):
        assert await send_events(site, session_id, (f"1.{number}", name, data)) == 200
        mark = await last()
        assert (mark["sequence"], mark["name"], mark.get("notice")) == (number, name, notice)


async def test_an_event_log_is_limited_and_reports_gaps(site: Site, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(events, "RETAINED_EVENTS", 20)
    monkeypatch.setattr(events, "RETAINED_CHARACTERS", 1000)
    session_id = await site.session()
    for number in range(1, 31):
        assert await send_events(site, session_id, (f"1.{number}", "text", "{}")) == 200
    found = await log(site, session_id)
    assert 20 <= found["count"] <= 22
    assert (found["cut"], found["events"][-1]["id"]) == (True, "1.30")
    assert (await log(site, session_id, after="1.25"))["cut"] is False
    assert (await log(site, session_id, after="1.2"))["cut"] is True
    assert await send_events(site, session_id, ("1.31", "text", f'{{"text":"{"x" * 1200}"}}')) == 200
    found = await log(site, session_id)
    assert ([e["id"] for e in found["events"]], found["cut"]) == (["1.31"], True), "the newest is always retained"
    await site.end(session_id)
    purge = Purge(site.database, Blobs(None, tmp_path / "blobs"), ttl=0, leads=lambda: True, clock=lambda: 1_000.0)
    await purge.run_once()
    async with site.database.read() as connection:
        assert await events.newest(connection, session_id) is None
