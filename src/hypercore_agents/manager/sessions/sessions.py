"""Sessions as their users see them: one, all of a user's, and the end of one. Turns are in `turns.py`."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from hypercore_agents.api.chat import SESSIONS_PAGE, SessionDeleted, SessionView
from hypercore_agents.api.errors import InvalidRequest, NotFound, Unavailable
from hypercore_agents.api.events import EventId, SessionEvents
from hypercore_agents.api.history import SessionDetail
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.agents import iso
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.sessions.history import Histories
from hypercore_agents.manager.sessions.purge import Purge
from hypercore_agents.store import events, leases, ledger, sessions
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.sessions import ENDED, SessionRow


@dataclass(frozen=True)
class SessionScope:
    """Whose sessions a caller may see, and on which agent; None: any."""

    user_id: str | None = None
    agent_id: str | None = None


class Sessions:
    """Finds, shows and ends sessions. `clock` returns Unix seconds."""

    def __init__(
        self,
        *,
        database: Database,
        directory: AgentDirectory,
        client: AgentClient,
        purge: Purge,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._histories = Histories(database)
        self._directory = directory
        self._client = client
        self._purge = purge
        self._clock = clock

    async def get(
        self, session_id: str, within: SessionScope, *, history: int = 0, before: int | None = None
    ) -> SessionDetail:
        """Return a session and so many messages of its conversation: the newest, or those before one of an earlier
        answer. Raises NotFound for one that is unknown, over, or out of the caller's reach.
        """
        async with self._database.read() as connection:
            view = await self._view(connection, await find_session(connection, session_id, within))
        messages, more = await self._histories.read(session_id, history, before)
        return SessionDetail(**dict(view), history=messages, history_next=more)

    async def list(
        self, within: SessionScope, after: str | None = None, limit: int = SESSIONS_PAGE
    ) -> tuple[list[SessionView], str | None]:
        """Return sessions within reach that have not ended, most recently used first, and the `after` of the next page.

        Raises InvalidRequest for an `after` that no answer gave.
        """
        behind = None if after is None else _place_in_list(after)
        async with self._database.read() as connection:
            rows = await sessions.list_sessions(
                connection, user_id=within.user_id, agent_id=within.agent_id, after=behind, limit=limit + 1
            )
            views = [await self._view(connection, row) for row in rows[:limit]]
        last = rows[limit - 1] if len(rows) > limit else None
        return views, None if last is None else f"{last.last_used_at!r}_{last.session_id}"

    async def events(self, session_id: str, within: SessionScope, after: EventId | None, limit: int) -> SessionEvents:
        """Return a session's log after an id, as far as the store has it. Raises NotFound as `get` does."""
        async with self._database.read() as connection:
            await find_session(connection, session_id, within)
            return events.listed(session_id, await events.page(connection, session_id, after, limit=limit))

    async def locate(self, session_id: str, within: SessionScope) -> Endpoint:
        """Return the agent that holds a session. Raises NotFound, or Unavailable when it is not running."""
        async with self._database.read() as connection:
            row = await find_session(connection, session_id, within)
            if row.agent_id is None:
                raise NotFound(f"session {session_id} is on no agent")
            return await self._directory.look_up(row.agent_id, connection)

    async def delete(self, session_id: str, within: SessionScope) -> SessionDeleted:
        """End a session for good: no token of it is honoured from now on; its agent kills what it started; then its
        transcript and workspace are deleted.

        An agent that does not answer is not waited for: it can do nothing more for the session. Raises NotFound.
        """
        async with self._database.write() as connection:
            row = await find_session(connection, session_id, within)
            endpoint = None
            if row.agent_id is not None:
                with contextlib.suppress(NotFound, Unavailable):  # an agent that is over holds no session
                    endpoint = await self._directory.look_up(row.agent_id, connection)
            await sessions.end_session(connection, session_id, now=self._clock())
        notices: list[str] = []
        if endpoint is not None:
            notices = await self._client.delete_session(endpoint.address, endpoint.bearer, session_id)
        await self._purge.purge(session_id)
        return SessionDeleted(session_id=session_id, notices=notices)

    async def _view(self, connection: Connection, row: SessionRow) -> SessionView:
        held = row.turn_holder is not None and await leases.holder_lives(connection, row.turn_holder, now=self._clock())
        return SessionView(
            session_id=row.session_id,
            user_id=row.user_id,
            agent_id=row.agent_id,
            state=cast("Literal['live', 'parked', 'ended']", row.state),
            turns=row.turn,
            running=held,
            created_at=iso(row.created_at),
            last_used_at=iso(row.last_used_at),
            usage=await ledger.session_usage(connection, row.session_id),
        )


async def find_session(connection: Connection, session_id: str, within: SessionScope) -> SessionRow:
    """Return a session's row. Raises NotFound for one that is unknown, over, or out of the caller's reach."""
    row = await sessions.get_session(connection, session_id)
    foreign = row is not None and (
        (within.user_id is not None and row.user_id != within.user_id)
        or (within.agent_id is not None and row.agent_id != within.agent_id)
    )
    if row is None or row.state == ENDED or foreign:
        raise NotFound(f"there is no session {session_id}")
    return row


def _place_in_list(after: str) -> tuple[float, str]:
    found = re.fullmatch(r"([0-9.e+-]{1,40})_([0-9a-f-]{36})", after)
    try:
        if found is not None:
            return float(found[1]), found[2]
    except ValueError:
        pass
    raise InvalidRequest("after: give the `next` of an earlier answer", field="after")
