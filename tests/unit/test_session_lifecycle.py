"""The table of a session's transitions, and the UPDATEs that enforce it."""

import ast
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Update, insert, select

from hypercore_agents import store
from hypercore_agents.store import session_lifecycle
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.session_lifecycle import INITIAL, ONGOING, TRANSITIONS, SessionState
from hypercore_agents.store.tables import sessions

UPDATES: dict[SessionState, Update] = {
    SessionState.PLACED: session_lifecycle.place(None, now=2.0),
    SessionState.UNPLACED: session_lifecycle.unplace(),
    SessionState.ENDED: session_lifecycle.end(now=2.0),
}


def test_every_state_is_in_the_table_and_only_ended_is_final() -> None:
    assert set(TRANSITIONS) == set(SessionState)
    assert [state for state, following in TRANSITIONS.items() if not following] == [SessionState.ENDED]
    assert set(ONGOING) == {SessionState.PLACED, SessionState.UNPLACED}
    reached, new = {INITIAL}, {INITIAL}
    while new:
        new = {after for state in new for after in TRANSITIONS[state]} - reached
        reached |= new
    assert reached == set(SessionState)


def test_the_stored_and_wire_values_stay() -> None:
    assert {state.name: state.value for state in SessionState} == {
        "PLACED": "live",
        "UNPLACED": "parked",
        "ENDED": "ended",
    }


@pytest.mark.parametrize(("before", "after"), [*product(SessionState, SessionState)])
async def test_an_update_changes_a_session_only_as_the_table_allows(
    tmp_path: Path, before: SessionState, after: SessionState
) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    await migrate(database)
    values: dict[str, Any] = {
        "session_id": "s", "user_id": "ada", "kind": "pool", "agent_id": None, "generation": 1, "state": before,
        "options": {}, "turn": 1, "turn_holder": "m", "created_at": 1.0, "last_used_at": 1.0,
    }  # fmt: skip
    async with database.write() as connection:
        await connection.execute(insert(sessions).values(values))
        changed = (await connection.execute(UPDATES[after].where(sessions.c.session_id == "s"))).rowcount
        row = (await connection.execute(select(sessions))).one()
    await database.close()
    allowed = after in TRANSITIONS[before]
    assert changed == allowed
    assert row.state == (after if allowed else before)
    assert row.generation == (2 if allowed and after is SessionState.PLACED else 1)
    assert (row.ended_at, row.turn_holder) == ((2.0, None) if allowed and after is SessionState.ENDED else (None, "m"))


def test_no_other_module_of_the_store_sets_a_sessions_state() -> None:
    setting = {
        path.name
        for path in Path(store.__file__).parent.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "values"
        if any(keyword.arg == "state" for keyword in call.keywords)
    }
    assert setting == {"session_lifecycle.py"}
