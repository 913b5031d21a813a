"""Guarantees of the store: capacity limits, exclusive turns, rising fences, guarded rows."""

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.errors import Unavailable
from hypercore_agents.api.ids import new_agent_id, new_session_id
from hypercore_agents.api.internal import Heartbeat
from hypercore_agents.store import (
    agents,
    enrolments,
    heartbeats,
    keys,
    leases,
    ledger,
    placement,
    pools,
    session_tokens,
    sessions,
    tables,
    turns,
)
from hypercore_agents.store import database as database_module
from hypercore_agents.store.database import Database, DatabaseUrlError, sqlite_url
from hypercore_agents.store.schema import migrate
from support.store_rows import AGENT


async def place(database: Database, session_id: str | None = None, agent_id: str | None = None) -> str | None:
    async with database.write(exclusive=placement.PLACEMENT) as connection:
        return await placement.place_new(
            connection,
            session_id=session_id or new_session_id(),
            user_id="ada",
            options={"tools": []},
            now=2.0,
            agent_id=agent_id,
        )


async def test_placement_is_even_and_never_over_capacity(database: Database) -> None:
    second = replace(AGENT, agent_id="agent-0000000000000002", created_at=2.0)
    async with database.write() as connection:
        await agents.insert_agent(connection, AGENT)
        await agents.insert_agent(connection, second)
    placed = await asyncio.gather(*(place(database) for _ in range(10)))
    assert placed.count(AGENT.agent_id) == 3
    assert placed.count(second.agent_id) == 3
    assert placed.count(None) == 4


async def test_an_agent_without_turns_gets_no_session(database: Database) -> None:
    second = replace(AGENT, agent_id="agent-0000000000000002", created_at=2.0)
    beat = Heartbeat(ready=False, sessions=0, live=0, running=0, waiting=0, memory_mb=1, memory_limit_mb=2)
    async with database.write() as connection:
        await agents.insert_agent(connection, AGENT)
        await agents.insert_agent(connection, second)
        await heartbeats.put_heartbeat(connection, AGENT.agent_id, beat, now=3.0)
    assert {await place(database) for _ in range(3)} == {second.agent_id}
    assert await place(database) is None
    async with database.write() as connection:
        await heartbeats.put_heartbeat(connection, AGENT.agent_id, beat.model_copy(update={"ready": True}), now=4.0)
    assert await place(database) == AGENT.agent_id


async def test_moves_are_even_and_within_capacity(database: Database) -> None:
    lost = replace(AGENT, agent_id="agent-000000000000000a", capacity=20)
    own = replace(AGENT, agent_id="agent-000000000000000b", kind=AgentKind.DEDICATED)
    async with database.write() as connection:
        await agents.insert_agent(connection, lost)
        await agents.insert_agent(connection, own)
    ids = [new_session_id() for _ in range(10)]
    for session_id in ids:
        assert await place(database, session_id) == lost.agent_id
    dedicated = new_session_id()
    assert await place(database, dedicated, own.agent_id) == own.agent_id

    async def move(session_id: str) -> str | None:
        async with database.write(exclusive=placement.PLACEMENT) as connection:
            return await placement.place_again(connection, session_id, now=3.0)

    for number in (1, 2):
        async with database.write() as connection:
            await agents.insert_agent(connection, replace(AGENT, agent_id=f"agent-000000000000000{number}"))
    assert await move(ids[0]) is None, "its agent is running, so it stays"
    async with database.write() as connection:
        await agents.change_agent(connection, lost.agent_id, 0, now=3.0, state=AgentState.DRAINING)
        await agents.change_agent(connection, own.agent_id, 0, now=3.0, state=AgentState.DRAINING)
        await leases.take_lease(connection, "manager:m", "m", now=3.0, seconds=10)
        await connection.execute(
            update(tables.sessions).where(tables.sessions.c.session_id == ids[9]).values(turn_holder="m")
        )
    assert await move(ids[9]) is None, "it is in a turn"
    assert await move(dedicated) is None
    async with database.write() as connection:
        assert await placement.unplace_sessions_of(connection, own.agent_id) == 0
    moved = await asyncio.gather(*(move(session_id) for session_id in ids[:9]))
    assert sorted(str(agent_id)[-1] for agent_id in moved if agent_id is not None) == ["1", "1", "1", "2", "2", "2"]
    async with database.write() as connection:
        assert await placement.unplace_sessions_of(connection, lost.agent_id) == 4
        row = await sessions.get_session(connection, next(s for s, a in zip(ids, moved, strict=False) if a is not None))
    assert row is not None
    assert (row.generation, row.state) == (2, "live")


@pytest.mark.parametrize("state", [state for state in AgentState if state is not AgentState.RUNNING])
async def test_only_running_agents_take_sessions(database: Database, state: AgentState) -> None:
    async with database.write() as connection:
        await agents.insert_agent(connection, replace(AGENT, state=state))
    assert await place(database) is None
    assert await place(database, agent_id=AGENT.agent_id) is None


async def test_a_turn_is_exclusive_until_it_ends_or_its_manager_dies(database: Database) -> None:
    session_id = new_session_id()
    async with database.write() as connection:
        await agents.insert_agent(connection, AGENT)
        await leases.take_lease(connection, "manager:one", "one", now=10.0, seconds=15)
    await place(database, session_id)

    async def begin(holder: str, now: float) -> sessions.SessionRow | None:
        async with database.write() as connection:
            return await turns.begin_turn(connection, session_id, holder=holder, max_tokens=7, temperature=0.5, now=now)

    first = await begin("one", 11.0)
    assert first is not None
    assert (first.turn, first.turn_max_tokens, first.turn_temperature) == (1, 7, 0.5)
    assert await begin("two", 12.0) is None
    assert await begin("one", 12.0) is None
    after_lease = await begin("two", 26.0)
    assert after_lease is not None
    assert after_lease.turn == 2
    async with database.write() as connection:
        await turns.end_turn(connection, session_id, 1, now=27.0)
        stale = await sessions.get_session(connection, session_id)
        assert stale is not None
        assert stale.turn_holder == "two"
        await turns.end_turn(connection, session_id, 2, now=27.0)
    assert (await begin("one", 28.0)) is not None


async def test_ended_sessions_free_their_capacity(database: Database) -> None:
    session_id = new_session_id()
    async with database.write() as connection:
        await agents.insert_agent(connection, replace(AGENT, capacity=1))
    assert await place(database, session_id) == AGENT.agent_id
    assert await place(database) is None
    async with database.write() as connection:
        assert await sessions.end_session(connection, session_id, now=3.0)
        assert not await sessions.end_session(connection, session_id, now=3.0)
    assert await place(database) == AGENT.agent_id


async def test_the_gateway_finds_a_session_only_with_its_agent(database: Database) -> None:
    session_id = new_session_id()
    async with database.write() as connection:
        await agents.insert_agent(connection, AGENT)
    await place(database, session_id)
    async with database.read() as connection:
        placed = await session_tokens.get_placed(connection, session_id, AGENT.agent_id)
        assert placed is not None
        assert (placed.session.user_id, placed.agent_kind, placed.agent_state) == ("ada", "pool", "running")
        assert await session_tokens.get_placed(connection, session_id, new_agent_id()) is None


async def test_agent_changes_are_guarded_by_version(database: Database) -> None:
    async with database.write() as connection:
        await agents.insert_agent(connection, AGENT)
        assert await agents.change_agent(connection, AGENT.agent_id, 0, now=2.0, state=AgentState.DRAINING)
        assert not await agents.change_agent(connection, AGENT.agent_id, 0, now=2.0, state=AgentState.FAILED)
        row = await agents.get_agent(connection, AGENT.agent_id)
    assert row is not None
    assert (row.state, row.version) == (AgentState.DRAINING, 1)


async def test_a_lease_gets_a_new_holder_only_after_it_expires(database: Database) -> None:
    async def take(holder: str, now: float) -> int | None:
        async with database.write() as connection:
            return await leases.take_lease(connection, "leader", holder, now=now, seconds=10)

    assert await take("one", 0.0) == 1
    assert await take("two", 9.0) is None
    assert await take("one", 9.0) == 1
    assert await take("two", 19.0) == 2
    async with database.read() as connection:
        assert await leases.holds(connection, "leader", 2, now=20.0)
        assert not await leases.holds(connection, "leader", 1, now=20.0)


async def test_an_enrolment_can_be_used_once(database: Database) -> None:
    async with database.write() as connection:
        await agents.insert_agent(connection, AGENT)
        await enrolments.add_enrolment(connection, secret_digest="d", agent_id=AGENT.agent_id, now=1.0, expires_at=2.0)
        assert await enrolments.use_enrolment(connection, "d", "key", now=1.5)
        assert not await enrolments.use_enrolment(connection, "d", "other", now=1.5)
        row = await enrolments.get_enrolment(connection, "d")
    assert row is not None
    assert row.public_key == "key"


async def test_the_first_owner_with_a_key_wins(database: Database) -> None:
    async with database.write() as connection:
        await keys.put_key(connection, keys.PLATFORM, b"platform", now=1.0)
        await keys.put_key(connection, keys.user_owner("ada"), b"old", now=1.0)
        await keys.put_key(connection, keys.user_owner("ada"), b"user", now=1.0)
        owners = [keys.agent_owner("agent-x"), keys.user_owner("ada"), keys.PLATFORM]
        found = await keys.first_key(connection, owners)
        assert found is not None
        assert found.sealed == b"user"
        assert await keys.delete_key(connection, keys.user_owner("ada"))
        found = await keys.first_key(connection, owners)
    assert found is not None
    assert found.sealed == b"platform"


async def test_the_ledger_sums_by_turn_session_and_day(database: Database) -> None:
    entry = ledger.LedgerEntry(86400.0, "ada", "agent-x", "s", 1, "claude", 10, 5, 2, 1, 1_500_000, "complete")
    async with database.write() as connection:
        await ledger.add_entry(connection, entry)
        await ledger.add_entry(connection, replace(entry, turn=2, output_tokens=7))
        turn = await ledger.session_usage(connection, "s", 2)
        whole = await ledger.session_usage(connection, "s")
        rows = await ledger.usage_rows(connection, user_id="ada", since=None, until=None, limit=10)
    assert (turn.input_tokens, turn.output_tokens, turn.total_tokens, turn.cost_usd) == (13, 7, 20, 1.5)
    assert whole.cost_usd == 3.0
    assert [(row.day, row.requests, row.output_tokens) for row in rows] == [("1970-01-02", 2, 12)]


async def test_the_pool_size_is_compare_and_set(database: Database) -> None:
    async with database.write() as connection:
        assert await pools.set_pool(connection, 2, version=None, now=1.0)
        assert not await pools.set_pool(connection, 3, version=None, now=1.0)
        assert await pools.set_pool(connection, 3, version=1, now=1.0)
        assert not await pools.set_pool(connection, 4, version=1, now=1.0)
        assert await pools.get_pool(connection) == pools.PoolRow(3, 2)


async def test_one_statement_is_its_own_transaction(database: Database) -> None:
    entry = ledger.LedgerEntry(86400.0, "ada", "agent-x", "s", 1, "claude", 10, 5, 0, 0, 7, "complete")
    async with database.write_one() as connection:
        await ledger.add_entry(connection, entry)

    async def half_done() -> None:
        async with database.write() as connection:
            await ledger.add_entry(connection, entry)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await half_done()
    other = Database(database.engine.url.render_as_string(hide_password=False).replace("onetrip", "aiosqlite"))
    async with other.read() as connection:
        assert await ledger.turn_output(connection, "s", 1) == 5
    await other.close()


async def test_processes_can_migrate_concurrently(store_url: str) -> None:
    databases = [Database(store_url) for _ in range(2)]
    await asyncio.gather(*(migrate(database) for database in databases))
    for database in databases:
        await database.check()
        await database.close()


async def test_a_locked_new_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite rejects turning on the log while another process does so, without its timeout."""
    path = tmp_path / "store.db"
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    sleep = asyncio.sleep
    waited: list[float] = []

    async def record_pause(seconds: float) -> None:
        if not waited:
            holder.rollback()
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(database_module, "SQLITE_BUSY_SECONDS", 0)  # as SQLite does not wait in that case
    database = Database(sqlite_url(path))
    monkeypatch.undo()
    monkeypatch.setattr(asyncio, "sleep", record_pause)
    await database.check()
    monkeypatch.undo()
    await database.close()
    holder.close()
    assert waited


async def test_a_damaged_store_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"this is not a database" * 100)
    database = Database(sqlite_url(tmp_path / "store.db"))
    with pytest.raises(Unavailable, match="store"):
        await database.check()
    await database.close()


def test_a_store_in_a_missing_folder_is_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUrlError, match=r"DATABASE_URL.*missing"):
        Database(sqlite_url(tmp_path / "missing" / "store.db"))


@pytest.mark.parametrize("url", ["nonsense", "mysql://secret@host/x"])
def test_an_invalid_url_error_contains_no_password(url: str) -> None:
    with pytest.raises(DatabaseUrlError, match="DATABASE_URL") as caught:
        Database(url)
    assert "secret" not in str(caught.value)
