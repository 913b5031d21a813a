"""Queries about placement: which agent holds a session. `session_lifecycle.py` has the states.

A session is placed by one guarded statement, which also requires the agent to be running and to have a free place. Run
it in `database.write(exclusive=PLACEMENT)`, so that counting and placing are atomic.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Integer, Select, cast, func, insert, literal, null, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import JSON, Float, String

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.store import session_lifecycle
from hypercore_agents.store.session_lifecycle import INITIAL, ONGOING
from hypercore_agents.store.sessions import COLUMNS, SessionRow, session_of
from hypercore_agents.store.tables import agents, heartbeats, sessions
from hypercore_agents.store.turns import no_turn_runs

PLACEMENT = "placement"
"""Lock of the transactions that place sessions."""

_POOL_RUNS = (agents.c.kind == AgentKind.POOL, agents.c.state == AgentState.RUNNING, agents.c.wanted == "running")
_POOL_PLACES = select(func.coalesce(func.sum(agents.c.capacity), 0)).where(*_POOL_RUNS)


async def place_new(
    connection: AsyncConnection,
    *,
    session_id: str,
    user_id: str,
    options: dict[str, Any],
    now: float,
    agent_id: str | None = None,
    share: float = 1.0,
) -> str | None:
    """Create a session on the given agent, or on the agent of the pool with the fewest sessions.

    Returns the agent's id. None: no such agent is running and has a free place, or the user holds their `share` of the
    pool's places.
    """
    chosen = _agent_with_free_place()
    if agent_id is None and share < 1:
        chosen = chosen.where(_within_share(user_id, share))
    chosen = chosen.where(agents.c.agent_id == agent_id if agent_id else agents.c.kind == AgentKind.POOL)
    target = chosen.subquery()
    values = {
        "session_id": literal(session_id, String),
        "user_id": literal(user_id, String),
        "kind": target.c.kind,
        "agent_id": target.c.agent_id,
        "generation": cast(literal(1), Integer),
        "state": literal(INITIAL, String),
        "options": literal(options, JSON),
        "turn": cast(literal(0), Integer),
        "turn_holder": cast(null(), String),
        "created_at": cast(literal(now), Float),
        "last_used_at": cast(literal(now), Float),
    }
    statement = insert(sessions).from_select(list(values), select(*values.values())).returning(sessions.c.agent_id)
    chosen_id: str | None = (await connection.execute(statement)).scalar_one_or_none()
    return chosen_id


async def place_again(
    connection: AsyncConnection, session_id: str, *, now: float, user_id: str = "", share: float = 1.0
) -> str | None:
    """Place a session of the pool that is not on a running agent and runs no turn.

    Returns the agent's id. None: the session is not in that state, no agent has a free place, or the user holds their
    `share` of the pool's places.
    """
    chosen = _agent_with_free_place().where(agents.c.kind == AgentKind.POOL).with_only_columns(agents.c.agent_id)
    if share < 1:
        chosen = chosen.where(_within_share(user_id, share))
    statement = (
        session_lifecycle.place(chosen.scalar_subquery(), now=now)
        .where(
            sessions.c.session_id == session_id,
            sessions.c.kind == AgentKind.POOL,
            or_(
                sessions.c.agent_id.is_(None),
                sessions.c.agent_id.not_in(select(agents.c.agent_id).where(agents.c.state == AgentState.RUNNING)),
            ),
            no_turn_runs(now),
            chosen.exists(),
        )
        .values(turn_holder=None)
        .returning(sessions.c.agent_id)
    )
    placed: str | None = (await connection.execute(statement)).scalar_one_or_none()
    return placed


async def move_turn(
    connection: AsyncConnection, session_id: str, *, generation: int, turn: int, away_from: Sequence[str], now: float
) -> SessionRow | None:
    """Place a session of the pool on another agent together with its running turn.

    Returns None if the session has been placed again or runs another turn, or if no agent except those in `away_from`
    has a free place.
    """
    chosen = _agent_with_free_place().where(agents.c.kind == AgentKind.POOL, agents.c.agent_id.not_in(away_from))
    chosen = chosen.with_only_columns(agents.c.agent_id)
    statement = (
        session_lifecycle.place(chosen.scalar_subquery(), now=now)
        .where(
            sessions.c.session_id == session_id,
            sessions.c.kind == AgentKind.POOL,
            sessions.c.generation == generation,
            sessions.c.turn == turn,
            sessions.c.turn_holder.is_not(None),
            chosen.exists(),
        )
        .returning(*COLUMNS)
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else session_of(row)


async def unplace_sessions_of(connection: AsyncConnection, agent_id: str) -> int:
    """Unplace all sessions of the pool that are on an agent; return their number."""
    statement = session_lifecycle.unplace().where(sessions.c.agent_id == agent_id, sessions.c.kind == AgentKind.POOL)
    return (await connection.execute(statement)).rowcount


async def unplace_idle(
    connection: AsyncConnection, session_id: str, generation: int, *, before: float, now: float
) -> bool:
    """Unplace a session if it is still idle and has not been placed again; return whether it was unplaced."""
    statement = (
        session_lifecycle.unplace()
        .where(sessions.c.session_id == session_id, sessions.c.generation == generation, *_idle(before, now))
        .values(turn_holder=None)
    )
    return (await connection.execute(statement)).rowcount == 1


async def list_idle(connection: AsyncConnection, *, before: float, now: float, limit: int) -> list[SessionRow]:
    """Return placed sessions of the pool that were last used before a time, longest unused first."""
    query = select(*COLUMNS).where(*_idle(before, now)).order_by(sessions.c.last_used_at).limit(limit)
    return [session_of(row) for row in await connection.execute(query)]


async def list_reclaimable(
    connection: AsyncConnection, *, before: float, now: float, limit: int, user_id: str | None = None
) -> list[SessionRow]:
    """Return idle sessions of the pool whose places may be reclaimed; `user_id`: only those of this user.

    The users with the most places come first, and each user's longest unused sessions.
    """
    held = sessions.alias("counted")
    places = (
        select(held.c.user_id, func.count().label("count"))
        .where(held.c.kind == AgentKind.POOL, held.c.agent_id.is_not(None), held.c.state.in_(ONGOING))
        .group_by(held.c.user_id)
        .subquery()
    )
    query = (
        select(*COLUMNS)
        .join(places, places.c.user_id == sessions.c.user_id)
        .join(agents, agents.c.agent_id == sessions.c.agent_id)
        .where(*_idle(before, now), *_POOL_RUNS)
        .order_by(places.c.count.desc(), sessions.c.last_used_at)
        .limit(limit)
    )
    if user_id is not None:
        query = query.where(sessions.c.user_id == user_id)
    return [session_of(row) for row in await connection.execute(query)]


async def count_places(connection: AsyncConnection, user_id: str) -> tuple[int, int]:
    """Return how many places of the pool a user's sessions hold, and how many places the pool has."""
    held = (await connection.execute(_places_of(user_id))).scalar_one()
    return int(held), int((await connection.execute(_POOL_PLACES)).scalar_one())


async def count_placed(connection: AsyncConnection) -> int:
    """Return the number of placed sessions."""
    query = select(func.count()).where(sessions.c.agent_id.is_not(None), sessions.c.state.in_(ONGOING))
    return int((await connection.execute(query)).scalar_one())


def _agent_with_free_place() -> Select[str, str]:
    """Return the query of the agent with the fewest sessions among those that run, are to keep running, accept turns
    according to their last heartbeat, and have a free place."""
    others = sessions.alias("others")
    placed = (
        select(func.count())
        .select_from(others)
        .where(others.c.agent_id == agents.c.agent_id, others.c.state.in_(ONGOING))
        .correlate(agents)
        .scalar_subquery()
    )
    return (
        select(agents.c.agent_id, agents.c.kind)
        .where(
            agents.c.state == AgentState.RUNNING,
            agents.c.wanted == "running",
            placed < agents.c.capacity,
            ~select(literal(1))
            .where(heartbeats.c.agent_id == agents.c.agent_id, heartbeats.c.ready.is_(False))
            .correlate(agents)
            .exists(),
        )
        .order_by(placed, agents.c.created_at, agents.c.agent_id)
        .limit(1)
    )


def _places_of(user_id: str) -> Select[int]:
    """Return the query of the number of the pool's places that a user's sessions hold."""
    held = sessions.alias("held")
    return select(func.count()).where(
        held.c.user_id == user_id,
        held.c.agent_id.in_(select(agents.c.agent_id).where(*_POOL_RUNS)),
        held.c.state.in_(ONGOING),
    )


def _within_share(user_id: str, share: float) -> ColumnElement[bool]:
    """Return the condition that a user holds less than a share of the pool's places, or none at all."""
    held = _places_of(user_id).scalar_subquery()
    return or_(held == 0, held < _POOL_PLACES.scalar_subquery() * share - 1e-9)


def _idle(before: float, now: float) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of placed sessions of the pool that were last used before a time and run no turn."""
    return (
        sessions.c.kind == AgentKind.POOL,
        sessions.c.state.in_(ONGOING),
        sessions.c.agent_id.is_not(None),
        sessions.c.last_used_at < before,
        no_turn_runs(now),
    )
