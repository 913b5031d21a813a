"""Which sessions a request may access. A session that is not accessible is not found, rather than forbidden."""

from dataclasses import dataclass

from hypercore_agents.api.errors import NotFound
from hypercore_agents.store import sessions
from hypercore_agents.store.database import Connection
from hypercore_agents.store.session_lifecycle import SessionState
from hypercore_agents.store.sessions import SessionRow


@dataclass(frozen=True)
class SessionAccess:
    """The accessible sessions: those of a user, on an agent. None: any."""

    user_id: str | None = None
    agent_id: str | None = None


async def find_session(connection: Connection, session_id: str, access: SessionAccess) -> SessionRow:
    """Return a session's row. Raises NotFound if it is unknown, has ended, or is not accessible."""
    row = await sessions.get_session(connection, session_id)
    if (
        row is None
        or row.state == SessionState.ENDED
        or (access.user_id is not None and row.user_id != access.user_id)
        or (access.agent_id is not None and row.agent_id != access.agent_id)
    ):
        raise NotFound(f"there is no session {session_id}")
    return row
