"""What an agent may request with its agent token: a new token, session tokens, a turn's usage, heartbeats, start slots.

An agent reaches only sessions that are placed on it; the response for any other session is the same as for one that
does not exist. A request that names a generation is valid only while the placement has that generation: an agent that
hung and resumes gets 409.
"""

import time
from collections.abc import Sequence
from typing import Any, cast

from hypercore_agents.api.agents import AgentState
from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import Conflict, Forbidden, NotFound
from hypercore_agents.api.internal import (
    AgentToken,
    EventMark,
    Heartbeat,
    HeartbeatTaken,
    LoggedName,
    SessionToken,
    SessionTokenRequest,
)
from hypercore_agents.gateway.credentials import Tokens
from hypercore_agents.gateway.start_slots import HeldSlot, StartSlots
from hypercore_agents.store import events
from hypercore_agents.store.agents import LIVE_STATES, get_agent
from hypercore_agents.store.append_state import AppendState, read_append_state
from hypercore_agents.store.database import Database
from hypercore_agents.store.heartbeats import put_heartbeat
from hypercore_agents.store.ledger import session_usage
from hypercore_agents.store.session_lifecycle import SessionState
from hypercore_agents.store.session_tokens import PlacedSession, get_placed

LOCAL_BACKENDS = frozenset({"process", "microvm"})
"""Compute backends that run agents on this machine."""
_MAX_KNOWN = 10_000
_NOT_HERE = "this session is not placed on this agent"


class AgentServices:
    """Serves `/internal/*` for agents whose token was checked."""

    def __init__(self, database: Database, tokens: Tokens, slots: StartSlots | None = None) -> None:
        self._database = database
        self._tokens = tokens
        self._slots = slots or StartSlots()
        self._is_local: dict[str, bool] = {}

    async def renew(self, agent_id: str) -> AgentToken:
        """Return a new agent token. Raises Forbidden if the agent has ended."""
        async with self._database.read() as connection:
            agent = await get_agent(connection, agent_id)
        if agent is None or agent.state not in LIVE_STATES:
            raise Forbidden("this agent has ended")
        token, expires_at = self._tokens.for_agent(agent_id)
        return AgentToken(agent_token=token, expires_at=expires_at)

    async def heartbeat(self, agent_id: str, beat: Heartbeat) -> HeartbeatTaken:
        """Store an agent's heartbeat. Raises Forbidden if the agent has ended."""
        now = time.time()
        async with self._database.write_one() as connection:
            live = await put_heartbeat(connection, agent_id, beat, now=now)
        if not live:
            raise Forbidden("this agent has ended")
        return HeartbeatTaken(at=now)

    async def start_slot(self, agent_id: str, *, wait: bool) -> HeldSlot:
        """Return the response that holds a start slot. Raises Forbidden if the agent has ended.

        An agent on another machine is not limited by this machine's slots.
        """
        local = self._is_local.get(agent_id)
        if local is None:
            async with self._database.read() as connection:
                agent = await get_agent(connection, agent_id)
            if agent is None or agent.state not in LIVE_STATES:
                raise Forbidden("this agent has ended")
            if len(self._is_local) >= _MAX_KNOWN:
                self._is_local.clear()
            local = self._is_local[agent_id] = agent.backend in LOCAL_BACKENDS
        return HeldSlot(self._slots if local else None, agent_id, wait=wait)

    async def session_token(self, agent_id: str, request: SessionTokenRequest) -> SessionToken:
        """Return a session token. Raises NotFound (not placed on this agent) or Conflict (a stale generation)."""
        async with self._database.read() as connection:
            await require_placed(connection, agent_id, request.session_id, request.generation)
            last = await events.newest(connection, request.session_id)
            notice = await events.text_of(connection, request.session_id, last) if last is not None else None
        token, expires_at = self._tokens.for_session(agent_id, request.session_id, request.generation)
        mark = None
        if last is not None:
            generation, sequence = last.event_id
            mark = EventMark(
                generation=generation, sequence=sequence, name=cast("LoggedName", last.name), notice=notice
            )
        return SessionToken(session_token=token, expires_at=expires_at, last_event=mark)

    async def turn_usage(self, agent_id: str, session_id: str, turn: int, generation: int) -> Usage:
        """Return the usage of a turn so far. Raises NotFound or Conflict, as `session_token` does."""
        async with self._database.read() as connection:
            await require_placed(connection, agent_id, session_id, generation)
            return await session_usage(connection, session_id, turn)


async def require_placed(connection: Any, agent_id: str, session_id: str, generation: int) -> PlacedSession:
    """Return a session that is placed on this agent. Raises NotFound, Forbidden (the agent ended) or Conflict."""
    placed = await get_placed(connection, session_id, agent_id)
    if placed is None:
        raise NotFound(_NOT_HERE)
    check_placed(placed.session.state, placed.agent_state, placed.session.generation, named=generation)
    return placed


async def require_append_state(
    connection: Any, agent_id: str, session_id: str, generation: int, *, uuids: Sequence[str], turn: int | None
) -> AppendState:
    """Do as `require_placed`, and return everything that an append to the session depends on."""
    state = await read_append_state(connection, agent_id, session_id, uuids=uuids, turn=turn)
    if state is None:
        raise NotFound(_NOT_HERE)
    check_placed(state.session_state, state.agent_state, state.generation, named=generation)
    return state


def check_placed(state: str, agent_state: AgentState, generation: int, *, named: int) -> None:
    """Raise NotFound (the session ended), Forbidden (the agent ended) or Conflict (the generation is not `named`)."""
    if state == SessionState.ENDED:
        raise NotFound(_NOT_HERE)
    if agent_state not in LIVE_STATES:
        raise Forbidden("this agent has ended")
    if generation != named:
        raise Conflict(
            f"generation {named} of this session is over; it is at {generation}", details={"generation": generation}
        )
