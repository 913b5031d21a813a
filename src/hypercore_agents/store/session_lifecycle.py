"""A session's states, the allowed transitions between them, and the guarded UPDATEs through which every change goes.

           ┌────────┐ moves to another agent
           ▼        │
    (new)─▶placed───┘
           │ ▲  │
           │ │  └─────────┐
           ▼ │            ▼
        unplaced ───────▶ ended

- `placed`: an agent holds the session. Its generation rises at each placement.
- `unplaced`: no agent holds it. Its data is in the store, and its next turn places it.
- `ended`: final. Its row remains until it is deleted by retention.

The stored and wire values are `live`, `parked` and `ended`. "Parked" is used elsewhere for another fact, which only the
agent knows: a placed session whose Claude CLI process has ended.

Invariants: an unplaced session has no agent, an ended one has no running turn. Each UPDATE changes only sessions whose
state the table allows to change, and matches no row otherwise; callers add their own conditions.

Rejected: reading the state first and checking it in Python (the row may change before the UPDATE).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from sqlalchemy import Update, update

from hypercore_agents.store.tables import sessions


class SessionState(StrEnum):
    """State of a session, by its stored value."""

    PLACED = "live"
    UNPLACED = "parked"
    ENDED = "ended"


INITIAL = SessionState.PLACED

TRANSITIONS: Mapping[SessionState, frozenset[SessionState]] = {
    SessionState.PLACED: frozenset({SessionState.PLACED, SessionState.UNPLACED, SessionState.ENDED}),
    SessionState.UNPLACED: frozenset({SessionState.PLACED, SessionState.ENDED}),
    SessionState.ENDED: frozenset(),
}

ONGOING = tuple(state for state, following in TRANSITIONS.items() if following)
"""States of sessions that have not ended. Queries over many sessions use `state IN ONGOING`, which an index serves;
`state != ENDED` is for queries of one session by its id."""


def place(agent_id: Any, *, now: float) -> Update:
    """Return an UPDATE that places sessions on an agent; `agent_id` may be a subquery."""
    values = {"agent_id": agent_id, "generation": sessions.c.generation + 1, "last_used_at": now}
    return _change_to(SessionState.PLACED).values(values)


def unplace() -> Update:
    """Return an UPDATE that takes sessions off their agents."""
    return _change_to(SessionState.UNPLACED).values(agent_id=None)


def end(*, now: float) -> Update:
    """Return an UPDATE that ends sessions."""
    return _change_to(SessionState.ENDED).values(turn_holder=None, ended_at=now)


def _change_to(state: SessionState) -> Update:
    before = [before for before, following in TRANSITIONS.items() if state in following]
    return update(sessions).where(sessions.c.state.in_(before)).values(state=state)
