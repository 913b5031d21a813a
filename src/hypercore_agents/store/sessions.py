"""Queries about sessions: placement, turns, and what the gateway resolves from a session token.

A placement is made in one guarded statement that also requires the agent to be running and to have room; call
it in `database.write(exclusive=PLACEMENT)`, so that counting and inserting cannot be torn apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Integer, bindparam, cast, func, insert, literal, null, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import JSON, Float, String

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.store.keys import PLATFORM, agent_owner, user_owner
from hypercore_agents.store.sqlite import AT_ONCE
from hypercore_agents.store.tables import agents, api_keys, heartbeats, leases, sessions

PLACEMENT = "placement"
LIVE, PARKED, ENDED = "live", "parked", "ended"
GOING_ON = (LIVE, PARKED)
"""What sessions are that have not ended. Asked for so, an index finds them among all that ever were; `!= ENDED` does
not, and is for one session's own row."""


@dataclass(frozen=True)
class SessionRow:
    """One session as stored. Times in Unix seconds."""

    session_id: str
    user_id: str
    kind: AgentKind
    agent_id: str | None
    generation: int
    state: str
    options: dict[str, Any]
    turn: int
    turn_holder: str | None
    turn_max_tokens: int | None
    turn_temperature: float | None
    created_at: float
    last_used_at: float
    ended_at: float | None


@dataclass(frozen=True)
class PlacedSession:
    """What the gateway needs to know about whoever presents a session token."""

    session: SessionRow
    agent_kind: AgentKind
    agent_state: AgentState


@dataclass(frozen=True)
class Caller:
    """Who makes a model request: a placed session, and the sealed keys that may pay, each None where there is none."""

    placed: PlacedSession
    agent_key: bytes | None
    user_key: bytes | None
    platform_key: bytes | None


_COLUMNS = [sessions.c[field.name] for field in fields(SessionRow)]


# The statements of every turn are built once: building one takes longer than running it.

_GET = select(*_COLUMNS).where(sessions.c.session_id == bindparam("session"))

_BEGIN_TURN = (
    update(sessions)
    .where(
        sessions.c.session_id == bindparam("session"),
        sessions.c.state != ENDED,
        sessions.c.agent_id.in_(select(agents.c.agent_id).where(agents.c.state == AgentState.RUNNING)),
        or_(
            sessions.c.turn_holder.is_(None),
            sessions.c.turn_holder.not_in(select(leases.c.holder).where(leases.c.expires_at > bindparam("now"))),
        ),
    )
    .values(
        turn=sessions.c.turn + 1,
        turn_holder=bindparam("holder"),
        turn_max_tokens=bindparam("max_tokens"),
        turn_temperature=bindparam("temperature"),
        last_used_at=bindparam("now"),
    )
    .returning(*_COLUMNS)
)

_END_TURN = (
    update(sessions)
    .where(sessions.c.session_id == bindparam("session"), sessions.c.turn == bindparam("number"))
    .values(turn_holder=None, last_used_at=bindparam("now"))
)

_ON_AGENT = (sessions.c.session_id == bindparam("session"), sessions.c.agent_id == bindparam("agent"))
_AGENT_COLUMNS = (agents.c.kind.label("agent_kind"), agents.c.state.label("agent_state"))
_PLACED = select(*_COLUMNS, *_AGENT_COLUMNS).join(agents, agents.c.agent_id == sessions.c.agent_id).where(*_ON_AGENT)


def _sealed_of(owner: Any) -> Any:
    return select(api_keys.c.sealed).where(api_keys.c.owner == owner).scalar_subquery()


_CALLER = (
    select(
        *_COLUMNS,
        *_AGENT_COLUMNS,
        _sealed_of(bindparam("agent_owner")).label("agent_key"),
        _sealed_of(literal(user_owner(""), String) + sessions.c.user_id).label("user_key"),
        _sealed_of(PLATFORM).label("platform_key"),
    )
    .join(agents, agents.c.agent_id == sessions.c.agent_id)
    .where(*_ON_AGENT)
    .execution_options(**AT_ONCE)
)


def _row(row: Any) -> SessionRow:
    values = {field.name: getattr(row, field.name) for field in fields(SessionRow)}
    return SessionRow(**{**values, "kind": AgentKind(values["kind"])})


_POOL_RUNS = (agents.c.kind == AgentKind.POOL, agents.c.state == AgentState.RUNNING, agents.c.wanted == "running")
_POOL_PLACES = select(func.coalesce(func.sum(agents.c.capacity), 0)).where(*_POOL_RUNS)


def _places_of(user_id: Any) -> Any:
    """Return the query that counts the places of the pool that a user's sessions hold."""
    held = sessions.alias("held")
    return select(func.count()).where(
        held.c.user_id == user_id,
        held.c.agent_id.in_(select(agents.c.agent_id).where(*_POOL_RUNS)),
        held.c.state.in_(GOING_ON),
    )


def _within_share(user_id: Any, share: float) -> Any:
    """Return the condition that a user holds less than a share of the pool's places, or none at all."""
    held = _places_of(user_id).scalar_subquery()
    return or_(held == 0, held < _POOL_PLACES.scalar_subquery() * share - 1e-9)


async def count_places(connection: AsyncConnection, user_id: str) -> tuple[int, int]:
    """Return how many places of the pool a user's sessions hold, and how many there are."""
    held = (await connection.execute(_places_of(user_id))).scalar_one()
    return int(held), int((await connection.execute(_POOL_PLACES)).scalar_one())


async def count_by_user(connection: AsyncConnection, *, placed: bool, limit: int) -> dict[str, int]:
    """Return how many sessions users have, the users with the most first; `placed`: only those with a pool's place."""
    count = func.count().label("count")
    query = select(sessions.c.user_id, count).where(sessions.c.state.in_(GOING_ON))
    if placed:
        query = query.where(sessions.c.kind == AgentKind.POOL, sessions.c.agent_id.is_not(None))
    query = query.group_by(sessions.c.user_id).order_by(count.desc(), sessions.c.user_id).limit(limit)
    return {user_id: int(number) for user_id, number in await connection.execute(query)}


async def count_of_user(connection: AsyncConnection, user_id: str, *, most: int) -> int:
    """Return how many sessions of a user have not ended; it stops to count at `most`."""
    some = select(literal(1)).where(sessions.c.user_id == user_id, sessions.c.state.in_(GOING_ON)).limit(most)
    return int((await connection.execute(select(func.count()).select_from(some.subquery()))).scalar_one())


async def list_reclaimable(
    connection: AsyncConnection, *, before: float, now: float, limit: int, user_id: str | None = None
) -> list[SessionRow]:
    """Return idle sessions of the pool whose places could be taken: those of the users with the most places first, and
    of each user the one that was used longest ago; `user_id`: only of this user."""
    held = sessions.alias("counted")
    places = (
        select(held.c.user_id, func.count().label("count"))
        .where(held.c.kind == AgentKind.POOL, held.c.agent_id.is_not(None), held.c.state.in_(GOING_ON))
        .group_by(held.c.user_id)
        .subquery()
    )
    query = (
        select(*_COLUMNS)
        .join(places, places.c.user_id == sessions.c.user_id)
        .join(agents, agents.c.agent_id == sessions.c.agent_id)
        .where(*_idle(before, now), *_POOL_RUNS)
        .order_by(places.c.count.desc(), sessions.c.last_used_at)
        .limit(limit)
    )
    if user_id is not None:
        query = query.where(sessions.c.user_id == user_id)
    return [_row(row) for row in await connection.execute(query)]


def _with_room() -> Any:
    """Return the query of the agent to place on: it runs and shall go on to run, takes turns by its last heartbeat, has
    room, and the fewest sessions."""
    others = sessions.alias("others")
    placed = (
        select(func.count())
        .select_from(others)
        .where(others.c.agent_id == agents.c.agent_id, others.c.state.in_(GOING_ON))
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
    """Create a session on the given agent, or on the pool agent with the fewest sessions.

    Returns the agent's id, or None when no such agent is running with room, or the user holds their `share` of the
    pool's places.
    """
    chosen = _with_room()
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
        "state": literal(LIVE, String),
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
    """Place a session of the pool anew that is on no running agent and in no turn; its generation rises.

    Returns the agent's id; None when there is nothing to move, or nowhere to move it (the user's `share` of the places
    included). Call it as `place_new`.
    """
    chosen = _with_room().where(agents.c.kind == AgentKind.POOL).with_only_columns(agents.c.agent_id)
    if share < 1:
        chosen = chosen.where(_within_share(user_id, share))
    holders = select(leases.c.holder).where(leases.c.expires_at > now)
    statement = (
        update(sessions)
        .where(
            sessions.c.session_id == session_id,
            sessions.c.kind == AgentKind.POOL,
            sessions.c.state != ENDED,
            or_(
                sessions.c.agent_id.is_(None),
                sessions.c.agent_id.not_in(select(agents.c.agent_id).where(agents.c.state == AgentState.RUNNING)),
            ),
            or_(sessions.c.turn_holder.is_(None), sessions.c.turn_holder.not_in(holders)),
            chosen.exists(),
        )
        .values(
            agent_id=chosen.scalar_subquery(),
            generation=sessions.c.generation + 1,
            state=LIVE,
            turn_holder=None,
            last_used_at=now,
        )
        .returning(sessions.c.agent_id)
    )
    placed: str | None = (await connection.execute(statement)).scalar_one_or_none()
    return placed


async def move_turn(
    connection: AsyncConnection, session_id: str, *, generation: int, turn: int, away_from: Sequence[str], now: float
) -> SessionRow | None:
    """Place a session of the pool, with the turn that its manager holds, on another agent; its generation rises.

    Returns None when the session is not where it was, or no agent but those of `away_from` has room. Call it as
    `place_new`.
    """
    chosen = _with_room().where(agents.c.kind == AgentKind.POOL, agents.c.agent_id.not_in(away_from))
    chosen = chosen.with_only_columns(agents.c.agent_id)
    statement = (
        update(sessions)
        .where(
            sessions.c.session_id == session_id,
            sessions.c.kind == AgentKind.POOL,
            sessions.c.state != ENDED,
            sessions.c.generation == generation,
            sessions.c.turn == turn,
            sessions.c.turn_holder.is_not(None),
            chosen.exists(),
        )
        .values(agent_id=chosen.scalar_subquery(), generation=sessions.c.generation + 1, state=LIVE, last_used_at=now)
        .returning(*_COLUMNS)
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else _row(row)


async def unplace_sessions_of(connection: AsyncConnection, agent_id: str) -> int:
    """Take the pool's sessions off an agent that stops; the next turn places each anew. Returns how many."""
    statement = (
        update(sessions)
        .where(sessions.c.agent_id == agent_id, sessions.c.kind == AgentKind.POOL, sessions.c.state.in_(GOING_ON))
        .values(agent_id=None, state=PARKED)
    )
    return (await connection.execute(statement)).rowcount


async def set_options(connection: AsyncConnection, session_id: str, options: dict[str, Any]) -> None:
    """Freeze other options, in the transaction that places a new session."""
    await connection.execute(update(sessions).where(sessions.c.session_id == session_id).values(options=options))


async def get_session(connection: AsyncConnection, session_id: str) -> SessionRow | None:
    """Return the session, whatever its state."""
    row = (await connection.execute(_GET, {"session": session_id})).one_or_none()
    return None if row is None else _row(row)


async def list_sessions(
    connection: AsyncConnection,
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    after: tuple[float, str] | None = None,
    limit: int = 1000,
) -> list[SessionRow]:
    """Return sessions that have not ended, most recently used first; `after`: those behind this time and id."""
    query = select(*_COLUMNS).where(sessions.c.state.in_(GOING_ON))
    if user_id is not None:
        query = query.where(sessions.c.user_id == user_id)
    if agent_id is not None:
        query = query.where(sessions.c.agent_id == agent_id)
    if after is not None:
        used, session_id = after
        ties = (sessions.c.last_used_at == used) & (sessions.c.session_id < session_id)
        query = query.where((sessions.c.last_used_at < used) | ties)
    order = sessions.c.last_used_at.desc(), sessions.c.session_id.desc()
    rows = await connection.execute(query.order_by(*order).limit(limit))
    return [_row(row) for row in rows]


async def begin_turn(
    connection: AsyncConnection,
    session_id: str,
    *,
    holder: str,
    max_tokens: int | None,
    temperature: float | None,
    now: float,
) -> SessionRow | None:
    """Take the session's one turn for this manager process and count it up.

    Returns None when a turn runs under a manager that still holds its lease (`leases`, by holder), or when the
    session is not placed on a running agent. The turn of a manager that died frees itself with its lease.
    """
    values = {"session": session_id, "holder": holder, "max_tokens": max_tokens, "temperature": temperature, "now": now}
    row = (await connection.execute(_BEGIN_TURN, values)).one_or_none()
    return None if row is None else _row(row)


async def end_turn(connection: AsyncConnection, session_id: str, turn: int, *, now: float) -> None:
    """Free the session for its next turn, if this turn is still its last."""
    await connection.execute(_END_TURN, {"session": session_id, "number": turn, "now": now})


async def touch(connection: AsyncConnection, session_id: str, *, now: float) -> None:
    """Note that a session is in use though no turn of it runs, so that it keeps its place."""
    statement = update(sessions).where(sessions.c.session_id == session_id, sessions.c.state != ENDED)
    await connection.execute(statement.values(last_used_at=now))


async def end_session(connection: AsyncConnection, session_id: str, *, now: float) -> bool:
    """End a session for good; return whether it was there."""
    statement = (
        update(sessions)
        .where(sessions.c.session_id == session_id, sessions.c.state != ENDED)
        .values(state=ENDED, turn_holder=None, ended_at=now)
    )
    return (await connection.execute(statement)).rowcount == 1


async def end_unused(connection: AsyncConnection, *, before: float, now: float) -> int:
    """End sessions that were last used before a time and run no turn; return how many."""
    statement = (
        update(sessions)
        .where(sessions.c.last_used_at < before, sessions.c.state.in_(GOING_ON), sessions.c.turn_holder.is_(None))
        .values(state=ENDED, ended_at=now)
    )
    return (await connection.execute(statement)).rowcount


def _idle(before: float, now: float) -> tuple[Any, ...]:
    return (
        sessions.c.kind == AgentKind.POOL,
        sessions.c.state.in_(GOING_ON),
        sessions.c.agent_id.is_not(None),
        sessions.c.last_used_at < before,
        or_(
            sessions.c.turn_holder.is_(None),
            sessions.c.turn_holder.not_in(select(leases.c.holder).where(leases.c.expires_at > now)),
        ),
    )


async def list_idle(connection: AsyncConnection, *, before: float, now: float, limit: int) -> list[SessionRow]:
    """Return sessions of the pool that hold a place and were last used before a time, longest unused first."""
    query = select(*_COLUMNS).where(*_idle(before, now)).order_by(sessions.c.last_used_at).limit(limit)
    return [_row(row) for row in await connection.execute(query)]


async def unplace_idle(
    connection: AsyncConnection, session_id: str, generation: int, *, before: float, now: float
) -> bool:
    """Take a session off its agent, if it is still idle and where it was; return whether it was."""
    statement = (
        update(sessions)
        .where(sessions.c.session_id == session_id, sessions.c.generation == generation, *_idle(before, now))
        .values(agent_id=None, state=PARKED, turn_holder=None)
    )
    return (await connection.execute(statement)).rowcount == 1


async def end_sessions_of(connection: AsyncConnection, agent_id: str, *, now: float) -> int:
    """End every session that is placed on an agent; return how many."""
    statement = (
        update(sessions)
        .where(sessions.c.agent_id == agent_id, sessions.c.state.in_(GOING_ON))
        .values(state=ENDED, turn_holder=None, ended_at=now)
    )
    return (await connection.execute(statement)).rowcount


async def count_turns(connection: AsyncConnection, agent_id: str, *, now: float) -> int:
    """Return how many turns run on an agent, under managers that still hold their lease."""
    alive = select(leases.c.holder).where(leases.c.expires_at > now)
    query = select(func.count()).where(
        sessions.c.agent_id == agent_id, sessions.c.state.in_(GOING_ON), sessions.c.turn_holder.in_(alive)
    )
    return int((await connection.execute(query)).scalar_one())


async def count_placed(connection: AsyncConnection) -> int:
    """Return how many sessions hold a place on an agent."""
    query = select(func.count()).where(sessions.c.agent_id.is_not(None), sessions.c.state.in_(GOING_ON))
    return int((await connection.execute(query)).scalar_one())


async def get_placed(connection: AsyncConnection, session_id: str, agent_id: str) -> PlacedSession | None:
    """Return a session with its agent, if that session is placed on that agent."""
    row = (await connection.execute(_PLACED, {"session": session_id, "agent": agent_id})).one_or_none()
    return None if row is None else PlacedSession(_row(row), AgentKind(row.agent_kind), AgentState(row.agent_state))


async def get_caller(connection: AsyncConnection, session_id: str, agent_id: str) -> Caller | None:
    """Return, in one statement, all that a model request of this session on this agent depends on."""

    values = {"session": session_id, "agent": agent_id, "agent_owner": agent_owner(agent_id)}
    row = (await connection.execute(_CALLER, values)).one_or_none()
    if row is None:
        return None
    placed = PlacedSession(_row(row), AgentKind(row.agent_kind), AgentState(row.agent_state))
    return Caller(placed, row.agent_key, row.user_key, row.platform_key)
