"""Everything that an append to a session depends on, read with one statement.

The answer of every turn waits for an append. With a query each for the session's placement, the turn's usage and the
sizes of transcript and log, it would be five statements before the first row is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, Integer, bindparam, func, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.chat import Usage
from hypercore_agents.store.events import LogEnds
from hypercore_agents.store.ledger import SESSION_USAGE, usage_of
from hypercore_agents.store.tables import agents, events, ledger, sessions, transcript_sizes, transcripts
from hypercore_agents.store.transcripts import Before


@dataclass(frozen=True)
class AppendState:
    """State of a session that is placed on an agent. `before`: of its transcript; `used`: by the requested turn."""

    session_state: str
    generation: int
    agent_state: AgentState
    used: Usage
    before: Before
    log: LogEnds


_SESSION: BindParameter[str] = bindparam("session")
_NEWEST, _OLDEST = events.alias("newest"), events.alias("oldest")
_USED = SESSION_USAGE.where(ledger.c.turn == bindparam("number", type_=Integer)).subquery("used")


def _of_log(number: Callable[[Any], Any]) -> Any:
    log = events.alias()
    return select(number(log.c.number)).where(log.c.session_id == _SESSION).scalar_subquery()


_QUERY = (
    select(
        sessions.c.state,
        sessions.c.generation,
        agents.c.state.label("agent_state"),
        *_USED.c,
        transcript_sizes.c.size_bytes,
        select(func.count())
        .where(transcripts.c.session_id == _SESSION, transcripts.c.uuid.in_(bindparam("uuids", expanding=True)))
        .scalar_subquery()
        .label("known"),
        *(_NEWEST.c[name].label(name) for name in ("number", "position", "total")),
        *(_OLDEST.c[name].label(f"oldest_{name}") for name in ("position", "total")),
    )
    .select_from(sessions)
    .join(agents, agents.c.agent_id == sessions.c.agent_id)
    .join(_USED, true())
    .outerjoin(transcript_sizes, transcript_sizes.c.session_id == sessions.c.session_id)
    .outerjoin(_NEWEST, (_NEWEST.c.session_id == sessions.c.session_id) & (_NEWEST.c.number == _of_log(func.max)))
    .outerjoin(_OLDEST, (_OLDEST.c.session_id == sessions.c.session_id) & (_OLDEST.c.number == _of_log(func.min)))
    .where(sessions.c.session_id == _SESSION, sessions.c.agent_id == bindparam("agent"))
)
"""Built once: building it takes longer than running it."""


async def read_append_state(
    connection: AsyncConnection, agent_id: str, session_id: str, *, uuids: Sequence[str], turn: int | None
) -> AppendState | None:
    """Return the state of a session that is placed on this agent, None if it is not placed there."""
    values = {"session": session_id, "agent": agent_id, "uuids": list(uuids), "number": turn}
    row = (await connection.execute(_QUERY, values)).one_or_none()
    if row is None:
        return None
    log = LogEnds()
    if row.number is not None:
        log = LogEnds(row.number, row.position, row.total, row.oldest_position, row.oldest_total)
    return AppendState(
        row.state,
        row.generation,
        AgentState(row.agent_state),
        usage_of(row.given, row.produced, row.cost),
        Before(row.size_bytes, row.known),
        log,
    )
