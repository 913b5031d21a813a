"""No statement of the store scans a growing table: every query runs, and SQLite returns its plan.

Every public coroutine of the store's query modules is called with samples for its parameters, by their names. The test
finds new queries by itself and fails until they have samples or a reason to be slow.
"""

import contextlib
import importlib
import inspect
import itertools
import pkgutil
import re
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import event

from hypercore_agents import store
from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.ids import new_agent_id, new_session_id
from hypercore_agents.api.internal import Heartbeat
from hypercore_agents.api.pool import RollStatus
from hypercore_agents.store import (
    agents,
    bearers,
    events,
    idempotency,
    ledger,
    placement,
    rates,
    rolls,
    transcripts,
    workspaces,
)
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.tables import metadata

WITHOUT_QUERIES = {"blobs", "database", "inspection", "migrations", "ownership", "schema", "sqlite", "tables"}
"""Modules of the store that have no queries."""
MODULES = [
    importlib.import_module(f"{store.__name__}.{found.name}")
    for found in pkgutil.iter_modules(store.__path__)
    if found.name not in WITHOUT_QUERIES
]
BOUNDED = {"installation", "leases", "pools", "rolls", "signals"}
"""Tables with one row per process, or a few rows in total."""
SLOW = {
    "keys.list_keys": "an operator's `keys rotate` and `keys list`",
    "keys.oldest_keys": "for a gauge, every few minutes; a row per user",
    "bearers.list_bearers": "an operator's `tokens list`",
    "agents.sealed_bearers": "an operator's `keys rotate`",
    "agents.forget_bearers": "an operator's `keys reset`",
    "workspaces.list_workspaces": "an operator's `blobs move`",
    "retention.delete_heartbeats": "the hourly deletion of old rows; a row per agent",
    "retention.delete_rates": "the hourly deletion of old rows; a row per user and window",
    "ledger.usage_rows": "an operator's sum over the whole ledger, without a user and days",
}
AGENT = agents.AgentRow(
    agent_id=new_agent_id(), user_id="ada", kind=AgentKind.POOL, state=AgentState.RUNNING, wanted="running",
    backend="process", cores=1, memory_mb=512, gpu_quota_mb=None, capacity=3, timeout_seconds=300, options={}, tags={},
    address="http://127.0.0.1:1", bearer_sealed=None, error=None, attempts=0, version=0, created_at=1.0, updated_at=1.0,
    running_at=None, ended_at=None,
)  # fmt: skip
SESSION = new_session_id()
BEAT = Heartbeat(ready=True, sessions=0, live=0, running=0, waiting=0, memory_mb=1, memory_limit_mb=1)
EVENT = events.EventRow((1, 2), "notice", '{"text": "x"}')
ENTRY = ledger.LedgerEntry(2.0, "ada", AGENT.agent_id, SESSION, 1, "claude-x", 1, 1, 0, 0, 1, "complete")
ROLL = rolls.RollRow(
    revision=1, template={}, before_revision=0, before_template={}, status=RollStatus.ROLLING, at_once=1, reason=None,
    started_at=1.0, ended_at=None,
)  # fmt: skip
SAMPLES: dict[str, list[Any]] = {
    "session_id": [SESSION],
    "agent_id": [AGENT.agent_id, None],
    "user_id": ["ada", None],
    "agent_ids": [[AGENT.agent_id], None],
    "kind": [AgentKind.POOL, None],
    "states": [agents.LIVE_STATES],
    "now": [2.0], "seconds": [5.0], "before": [1.5], "expires_at": [9.0], "since": [1.0, "2026-01-01", None],
    "until": ["2026-01-02", None], "steady": [1.0],
    "agent": [replace(AGENT, agent_id=new_agent_id())],
    "version": [0], "revision": [1], "generation": [1], "turn": [1, None], "desired": [1], "fence": [1],
    "uuids": [["u1"]], "ticket": [7], "limit": [10], "after": [(1, 1), 1, None, 0],
    "sealed": [b"x"], "old": [b"x"], "new": [b"y"],
    "bearer": [bearers.BearerRow("d", "n", "user", "ada", 1.0, None)],
    "digest": ["d"], "name": ["n"], "secret_digest": ["s"], "public_key": ["p"],
    "holder": ["h"], "prefix": ["manager:"], "value": [1.0],
    "rows": [[EVENT]], "beat": [BEAT], "entry": [ENTRY], "roll": [ROLL],
    "key": [idempotency.Key("ada", "chat", "k")], "body_digest": ["b"], "made": ["m"], "status": [200],
    "answer": [b"a"], "owner": ["user:ada"], "owners": [["user:ada", "platform"]],
    "entries": [[transcripts.EntryRow("", "u", "{}")]],
    "limits": [[rates.Limit(60, 10)]],
    "placed": [True, False], "most": [5], "share": [0.5],
    "size": [1, 0], "key_id": ["k"], "key_ids": [["k"]], "away_from": [[AGENT.agent_id]],
    "options": [{}], "max_tokens": [1], "temperature": [0.5], "reason": ["r"],
}  # fmt: skip
PARTICULAR: dict[tuple[str, str], list[Any]] = {
    ("events.text_of", "row"): [EVENT],
    ("workspaces.put_workspace", "row"): [workspaces.WorkspaceRow(SESSION, "o", "d", 1)],
    ("placement.place_new", "session_id"): [new_session_id()],
    ("transcripts.load", "after"): [0, 1],
    ("transcripts.load_back", "before"): [None, 7],
    ("events.page", "after"): [(1, 1), None],
    ("sessions.list_sessions", "after"): [None, (1.0, SESSION)],
    ("heartbeats.has_witness", "since"): [1.0],
    ("transcripts.append", "limit"): [10_000],
    ("transcripts.append", "before"): [None, transcripts.Before(100, 1)],
    ("installation.put_note", "value"): [{"note": 1}],
    ("installation.replace_note", "value"): [{"note": 1}],
    ("signing.note_signing", "until"): [2.0],
    ("workspaces.stored_by", "besides"): [workspaces.WorkspaceRow(SESSION, "o", "d", 1), None],
    ("ledger.usage_rows", "since"): ["2026-01-01", None],
}


def queries() -> list[tuple[str, Any]]:
    return [
        (f"{module.__name__.rpartition('.')[2]}.{name}", function)
        for module in MODULES
        for name, function in vars(module).items()
        if inspect.iscoroutinefunction(function) and function.__module__ == module.__name__ and name[0] != "_"
    ]


def calls(name: str, function: Any) -> list[dict[str, Any]]:
    """Return the arguments of all calls: every combination of the samples with the right types."""
    choices: dict[str, list[Any]] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        samples = PARTICULAR.get((name, parameter.name)) or SAMPLES.get(parameter.name)
        if samples is None:
            assert parameter.default is not inspect.Parameter.empty, f"no sample for {parameter.name} of {name}"
            continue
        annotation = str(parameter.annotation)
        fits = [
            each for each in samples
            if (name, parameter.name) in PARTICULAR
            or (each is None and "None" in annotation)
            or (isinstance(each, float) and "float" in annotation)
            or (isinstance(each, str) and "str" in annotation)
            or (each is not None and not isinstance(each, str | float))
        ]  # fmt: skip
        choices[parameter.name] = fits
    return [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(sqlite_url(tmp_path / "store.db"))
    await migrate(database)
    async with database.write() as connection:
        await agents.insert_agent(connection, AGENT)
        await placement.place_new(connection, session_id=SESSION, user_id="ada", options={}, now=1.0)
        await transcripts.append(connection, SESSION, [transcripts.EntryRow("", f"u{n}", "{}") for n in range(9)])
        await events.append(connection, SESSION, [replace(EVENT, event_id=(1, n)) for n in range(1, 3)], now=1.0)
    yield database
    await database.close()


class _UndoneError(Exception):
    """Rolls a transaction back."""


async def test_no_query_scans_a_growing_table(database: Database, tmp_path: Path) -> None:
    seen: list[tuple[str, Any]] = []

    @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, parameters: Any, ___: Any, many: bool) -> None:
        seen.append((statement, parameters[0] if many else parameters))

    slow: dict[str, set[str]] = {}
    for name, function in queries():
        seen.clear()
        for arguments in calls(name, function):
            with contextlib.suppress(_UndoneError):
                async with database.write() as connection:
                    await function(connection, **arguments)
                    raise _UndoneError
        assert seen, f"{name} ran no statement"
        with sqlite3.connect(tmp_path / "store.db") as plain:
            for statement, parameters in dict.fromkeys(seen):
                if found := scans(plain, statement, parameters):
                    slow.setdefault(name, set()).update(found)
    assert slow.keys() == SLOW.keys(), {name: slow[name] for name in slow.keys() - SLOW.keys()}


def scans(plain: sqlite3.Connection, statement: str, parameters: Any) -> set[str]:
    """Return the steps of a plan that scan a growing table, or all sessions including the ended ones."""
    names = {alias: table for table, alias in re.findall(r"(\w+) AS (\w+)", statement)}
    found = set()
    for _, _, _, step in plain.execute(f"EXPLAIN QUERY PLAN {statement}", parameters):
        match = re.match(r"(SCAN|SEARCH) (\w+)", step)
        table = names.get(match[2], match[2]) if match else ""
        if table not in metadata.tables or table in BOUNDED or match is None:
            continue
        if match[1] == "SCAN" or (table == "sessions" and "=?" not in step):
            found.add(step)
    return found


@pytest.mark.parametrize("query", ["transcripts.load", "transcripts.load_back", "events.page", "events.newest"])
async def test_pages_are_read_in_index_order(database: Database, tmp_path: Path, query: str) -> None:
    seen: list[tuple[str, Any]] = []

    @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, parameters: Any, ___: Any, ____: bool) -> None:
        seen.append((statement, parameters))

    for arguments in calls(query, dict(queries())[query]):
        async with database.read() as connection:
            await dict(queries())[query](connection, **arguments)
    with sqlite3.connect(tmp_path / "store.db") as plain:
        plans = {
            statement: [row[3] for row in plain.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            for statement, parameters in seen
        }
    assert plans
    for statement, steps in plans.items():
        bounded = " IN (" in statement  # rows of one page, by their ids
        assert bounded or not [step for step in steps if "TEMP B-TREE" in step], (statement, steps)
        assert all(step.startswith(("SEARCH", "USE TEMP B-TREE", "LIST SUBQUERY")) for step in steps), steps
