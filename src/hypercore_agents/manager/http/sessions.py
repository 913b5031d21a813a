"""Routes that list, show and delete sessions."""

from fastapi import APIRouter

from hypercore_agents.api.chat import SESSIONS_PAGE, SessionDeleted, SessionList, SessionsAfter, SessionsLimit
from hypercore_agents.api.history import HISTORY_PAGE, HistoryBefore, HistoryCount, SessionDetail
from hypercore_agents.api.ids import UserId
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.manager.http.auth import RequestCaller
from hypercore_agents.manager.http.session_access import Access, session_route
from hypercore_agents.manager.sessions.access import SessionAccess
from hypercore_agents.manager.sessions.sessions import Sessions


def sessions_router(sessions: Sessions) -> APIRouter:
    """Return the routes `session/{session_id}`, and `GET /v1/agent/sessions`."""
    router = CheckedRouter(tags=["sessions"])

    @router.get("/v1/agent/sessions")
    async def list_sessions(
        caller: RequestCaller,
        user_id: UserId | None = None,
        after: SessionsAfter | None = None,
        limit: SessionsLimit = SESSIONS_PAGE,
    ) -> SessionList:
        """List sessions that have not ended, most recently used first. `after`: the `next` of the previous page."""
        user = caller.acting_for(user_id)
        found, more = await sessions.list(SessionAccess(user), after, limit)
        return SessionList(user_id=user, count=len(found), sessions=found, next=more)

    @session_route(router, "GET", "/session/{session_id}")
    async def get_session(
        session_id: str,
        access: Access,
        history: HistoryCount = HISTORY_PAGE,
        before: HistoryBefore = None,
    ) -> SessionDetail:
        """Show a session: its state, usage, cost, and the newest messages of its conversation."""
        return await sessions.get(session_id, access, history=history, before=before)

    @session_route(router, "DELETE", "/session/{session_id}")
    async def delete_session(session_id: str, access: Access) -> SessionDeleted:
        """End a session permanently and delete its data."""
        return await sessions.delete(session_id, access)

    return router
