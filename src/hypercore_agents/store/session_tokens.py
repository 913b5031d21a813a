"""Queries with which the gateway resolves a session token: the session, its agent, and the keys that may pay."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import String, bindparam, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.store.keys import PLATFORM, agent_owner, user_owner
from hypercore_agents.store.sessions import COLUMNS, SessionRow, session_of
from hypercore_agents.store.sqlite import ON_EVENT_LOOP
from hypercore_agents.store.tables import agents, api_keys, sessions


@dataclass(frozen=True)
class PlacedSession:
    """A session and the agent on which it is placed."""

    session: SessionRow
    agent_kind: AgentKind
    agent_state: AgentState


@dataclass(frozen=True)
class Caller:
    """The sender of a model request: a placed session, and the sealed keys that may pay. None: there is no such key."""

    placed: PlacedSession
    agent_key: bytes | None
    user_key: bytes | None
    platform_key: bytes | None


_ON_AGENT = (sessions.c.session_id == bindparam("session"), sessions.c.agent_id == bindparam("agent"))
_AGENT_COLUMNS = (agents.c.kind.label("agent_kind"), agents.c.state.label("agent_state"))
_PLACED = select(*COLUMNS, *_AGENT_COLUMNS).join(agents, agents.c.agent_id == sessions.c.agent_id).where(*_ON_AGENT)


def _sealed_of(owner: Any) -> Any:
    return select(api_keys.c.sealed).where(api_keys.c.owner == owner).scalar_subquery()


_CALLER = (
    select(
        *COLUMNS,
        *_AGENT_COLUMNS,
        _sealed_of(bindparam("agent_owner")).label("agent_key"),
        _sealed_of(literal(user_owner(""), String) + sessions.c.user_id).label("user_key"),
        _sealed_of(PLATFORM).label("platform_key"),
    )
    .join(agents, agents.c.agent_id == sessions.c.agent_id)
    .where(*_ON_AGENT)
    .execution_options(**ON_EVENT_LOOP)
)


async def get_placed(connection: AsyncConnection, session_id: str, agent_id: str) -> PlacedSession | None:
    """Return a session with its agent, if it is placed on that agent."""
    row = (await connection.execute(_PLACED, {"session": session_id, "agent": agent_id})).one_or_none()
    return None if row is None else _placed(row)


async def get_caller(connection: AsyncConnection, session_id: str, agent_id: str) -> Caller | None:
    """Return everything that a model request of this session on this agent depends on, by one statement."""
    values = {"session": session_id, "agent": agent_id, "agent_owner": agent_owner(agent_id)}
    row = (await connection.execute(_CALLER, values)).one_or_none()
    return None if row is None else Caller(_placed(row), row.agent_key, row.user_key, row.platform_key)


def _placed(row: Any) -> PlacedSession:
    return PlacedSession(session_of(row), AgentKind(row.agent_kind), AgentState(row.agent_state))
