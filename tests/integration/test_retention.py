"""Retention: old rows of agents, sessions, heartbeats, rates and the ledger are deleted unless still needed."""

from dataclasses import replace
from typing import Any

from sqlalchemy import func, select

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.manager.retention import Retention, RetentionPeriods
from hypercore_agents.store.agents import insert_agent
from hypercore_agents.store.database import Database
from hypercore_agents.store.ledger import LedgerEntry, add_entry
from hypercore_agents.store.tables import agents, enrolments, events, heartbeats, ledger, rates, sessions
from support.gateway_server import agent_row

DAY = 86400.0
NOW = 1000 * DAY
PERIODS = RetentionPeriods(agents=30 * DAY, sessions=30 * DAY, ledger=400 * DAY)


def beat(agent_id: str) -> dict[str, Any]:
    numbers = dict.fromkeys(("sessions", "live", "running", "waiting", "memory_mb", "memory_limit_mb"), 0)
    return {"agent_id": agent_id, "at": 1.0, "ready": True, **numbers}


def session(session_id: str, agent_id: str, ended_at: float | None) -> dict[str, Any]:
    state = "live" if ended_at is None else "ended"
    return {
        "session_id": session_id, "user_id": "ada", "kind": "pool", "agent_id": agent_id, "generation": 1,
        "state": state, "options": {}, "created_at": 1.0, "last_used_at": 1.0, "ended_at": ended_at,
    }  # fmt: skip


def rate(user_id: str, at: float) -> dict[str, Any]:
    window = int(at / 60 * 20)
    return {"user_id": user_id, "window_seconds": 60, "window": window, "requests": 1, "requests_before": 0}


async def filled(database: Database) -> None:
    """Fill the store with old rows, recent rows, and old rows that are still needed."""
    async with database.write() as connection:
        for name, ended_at, state in (
            ("old", NOW - 31 * DAY, AgentState.FAILED),
            ("named", NOW - 31 * DAY, AgentState.STOPPED),
            ("recent", NOW - 29 * DAY, AgentState.STOPPED),
            ("running", None, AgentState.RUNNING),
        ):
            await insert_agent(connection, replace(agent_row(name, AgentKind.POOL, state), ended_at=ended_at))
            await connection.execute(heartbeats.insert().values(**beat(name)))
            enrolment = {"secret_digest": name, "agent_id": name, "created_at": 1.0, "expires_at": 2.0}
            await connection.execute(enrolments.insert().values(**enrolment))
        for session_id, agent_id, ended_at in (
            ("old", "old", NOW - 31 * DAY),
            ("unpurged", "named", NOW - 31 * DAY),
            ("recent", "recent", NOW - 29 * DAY),
            ("live", "running", None),
        ):
            await connection.execute(sessions.insert().values(**session(session_id, agent_id, ended_at)))
        event = {
            "session_id": "unpurged",
            "number": 1,
            "name": "text",
            "data": "{}",
            "position": 1,
            "total": 1,
            "at": 1.0,
        }
        await connection.execute(events.insert().values(**event))
        for session_id, at in (("gone", NOW - 402 * DAY), ("live", NOW - 402 * DAY), ("gone", NOW - 399 * DAY)):
            entry = LedgerEntry(at, "ada", "old", session_id, 1, "claude", 1, 1, 0, 0, 1, "complete")
            await add_entry(connection, entry)
        await connection.execute(rates.insert().values(**rate("old", NOW - 2 * DAY)))
        await connection.execute(rates.insert().values(**rate("recent", NOW - 60)))


async def names(database: Database, column: Any) -> set[str]:
    async with database.read() as connection:
        return set((await connection.execute(select(column))).scalars())


async def test_old_rows_are_deleted_unless_they_are_still_needed(database: Database) -> None:
    await filled(database)
    for _ in range(2):
        await Retention(database, PERIODS, leads=lambda: True, clock=lambda: NOW).run_once()
        assert await names(database, sessions.c.session_id) == {"unpurged", "recent", "live"}
        assert await names(database, agents.c.agent_id) == {"named", "recent", "running"}
        assert await names(database, enrolments.c.agent_id) == {"named", "recent", "running"}
        assert await names(database, heartbeats.c.agent_id) == {"running"}
        assert await names(database, rates.c.user_id) == {"recent"}
        async with database.read() as connection:
            entries = select(ledger.c.session_id, ledger.c.day).order_by(ledger.c.day)
            assert [row.session_id for row in await connection.execute(entries)] == ["live", "gone"]


async def test_zero_retains_all_rows_and_only_the_leader_deletes(database: Database) -> None:
    await filled(database)
    await Retention(database, PERIODS, leads=lambda: False, clock=lambda: NOW).run_once()
    assert len(await names(database, heartbeats.c.agent_id)) == 4
    await Retention(database, RetentionPeriods(0, 0, 0), leads=lambda: True, clock=lambda: NOW).run_once()
    assert len(await names(database, sessions.c.session_id)) == 4
    assert len(await names(database, agents.c.agent_id)) == 4
    async with database.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(ledger))).scalar_one() == 3


async def test_one_run_deletes_more_rows_than_one_transaction(database: Database) -> None:
    async with database.write() as connection:
        await insert_agent(connection, replace(agent_row("one", AgentKind.POOL, AgentState.STOPPED), ended_at=1.0))
        rows = [session(f"session-{number}", "one", 1.0) for number in range(1201)]
        await connection.execute(sessions.insert(), rows)
    await Retention(database, PERIODS, leads=lambda: True, clock=lambda: NOW).run_once()
    assert await names(database, sessions.c.session_id) == set()
    assert await names(database, agents.c.agent_id) == set()


async def test_sessions_retained_forever_do_not_retain_agents(database: Database) -> None:
    """`ENDED_SESSIONS_TTL=0` affects only sessions."""
    await filled(database)
    await Retention(database, replace(PERIODS, sessions=0), leads=lambda: True, clock=lambda: NOW).run_once()
    assert await names(database, sessions.c.session_id) == {"old", "unpurged", "recent", "live"}
    assert await names(database, agents.c.agent_id) == {"named", "recent", "running"}
    assert None in await names(database, sessions.c.agent_id), "the old session outlives its agent"


async def test_agents_retained_forever_outlive_their_sessions(database: Database) -> None:
    await filled(database)
    await Retention(database, replace(PERIODS, agents=0), leads=lambda: True, clock=lambda: NOW).run_once()
    assert await names(database, sessions.c.session_id) == {"unpurged", "recent", "live"}
    assert await names(database, agents.c.agent_id) == {"old", "named", "recent", "running"}
