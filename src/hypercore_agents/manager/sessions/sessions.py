"""Lists, shows and deletes sessions. Turns are in `turns.py`."""

import contextlib
import re
from collections.abc import Callable

from hypercore_agents.api.chat import SESSIONS_PAGE, SessionDeleted, SessionView
from hypercore_agents.api.errors import InvalidRequest, NotFound, Unavailable
from hypercore_agents.api.events import EventId, SessionEvents
from hypercore_agents.api.history import SessionDetail
from hypercore_agents.manager.fleet.agent_client import AgentClient
from hypercore_agents.manager.fleet.agents import iso
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.sessions.access import SessionAccess, find_session
from hypercore_agents.manager.sessions.history import Histories
from hypercore_agents.manager.sessions.purge import Purge
from hypercore_agents.store import events, leases, ledger, sessions
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.sessions import SessionRow


class Sessions:
    """Lists, shows and deletes sessions. `clock` returns Unix seconds."""

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
        self, session_id: str, access: SessionAccess, *, history: int = 0, before: int | None = None
    ) -> SessionDetail:
        """Return a session and up to `history` messages of its conversation: the newest, or those `before` an entry.

        Raises NotFound if the session is unknown, has ended, or is not accessible to the caller.
        """
        async with self._database.read() as connection:
            view = await self._view(connection, await find_session(connection, session_id, access))
        messages, more = await self._histories.read(session_id, history, before)
        return SessionDetail(**dict(view), history=messages, history_next=more)

    async def list(
        self, access: SessionAccess, after: str | None = None, limit: int = SESSIONS_PAGE
    ) -> tuple[list[SessionView], str | None]:
        """Return accessible sessions that have not ended, most recently used first, and `after` for the next page.

        Raises InvalidRequest if `after` does not come from an earlier page.
        """
        position = None if after is None else _position(after)
        async with self._database.read() as connection:
            rows = await sessions.list_sessions(
                connection, user_id=access.user_id, agent_id=access.agent_id, after=position, limit=limit + 1
            )
            views = [await self._view(connection, row) for row in rows[:limit]]
        last = rows[limit - 1] if len(rows) > limit else None
        return views, None if last is None else f"{last.last_used_at!r}_{last.session_id}"

    async def events(self, session_id: str, access: SessionAccess, after: EventId | None, limit: int) -> SessionEvents:
        """Return the stored events of a session after an id. Raises NotFound as `get` does."""
        async with self._database.read() as connection:
            await find_session(connection, session_id, access)
            return events.listed(session_id, await events.page(connection, session_id, after, limit=limit))

    async def locate(self, session_id: str, access: SessionAccess) -> Endpoint:
        """Return the agent on which a session is placed. Raises NotFound, or Unavailable if it is not running."""
        async with self._database.read() as connection:
            row = await find_session(connection, session_id, access)
            if row.agent_id is None:
                raise NotFound(f"session {session_id} is not placed on an agent")
            return await self._directory.look_up(row.agent_id, connection)

    async def delete(self, session_id: str, access: SessionAccess) -> SessionDeleted:
        """End a session permanently: its tokens become invalid at once, its agent kills its processes, and its
        transcript and workspace are deleted.

        The deletion does not depend on the agent's response, because the agent can no longer write for the session.
        Raises NotFound.
        """
        async with self._database.write() as connection:
            row = await find_session(connection, session_id, access)
            endpoint = None
            if row.agent_id is not None:
                with contextlib.suppress(NotFound, Unavailable):  # an agent that has ended holds no sessions
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
            state=row.state.value,
            turns=row.turn,
            running=held,
            created_at=iso(row.created_at),
            last_used_at=iso(row.last_used_at),
            usage=await ledger.session_usage(connection, row.session_id),
        )


def _position(after: str) -> tuple[float, str]:
    found = re.fullmatch(r"([0-9.e+-]{1,40})_([0-9a-f-]{36})", after)
    try:
        if found is not None:
            return float(found[1]), found[2]
    except ValueError:
        pass
    raise InvalidRequest("after: must be the `next` of an earlier page", field="after")
