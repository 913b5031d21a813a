"""The agent's HTTP routes. They are thin: the behaviour is in `agent/sessions`, the wire models are in `api`."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from hypercore_agents.agent.isolation.processes import private_memory_mb
from hypercore_agents.agent.launcher.workspace_files import MOST_LEVELS
from hypercore_agents.agent.server.downloads import Download
from hypercore_agents.agent.server.responses import ChatReply, EventFollower
from hypercore_agents.agent.server.server import AgentServer
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.api.agents import AgentLoad, ShareView
from hypercore_agents.api.approvals import ApprovalDecision, ApprovalList, ApprovalResolved
from hypercore_agents.api.chat import InterruptResponse, PlacedChatRequest, SessionDeleted, SessionOpening, SessionView
from hypercore_agents.api.errors import Conflict, HypercoreError, InvalidRequest, Unavailable
from hypercore_agents.api.events import EVENTS_PAGE, EventsAfter, EventsLimit, SessionEvents, parse_id
from hypercore_agents.api.files import MOST_ENTRIES, FileDeleted, FileList, FilePath, FilesLimit, FileWritten
from hypercore_agents.http.context import Receive, Scope, Send, note_ids, span_of
from hypercore_agents.http.errors import TEXT_RESPONSES
from hypercore_agents.http.paths import PathInUrl
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.observability.metrics import CONTENT_TYPE, AgentMetrics

_FILE_ARCHIVE_SECONDS = 60.0
"""How long the response to a file change waits for the archive; less than the manager waits for the response."""
_CHAT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "the turn's result; with `stream`, server-sent events"}
}


class _ChatResponse(Response):
    """Lets the chat route respond on bare ASGI."""

    def __init__(self, reply: ChatReply) -> None:
        super().__init__()
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with counted(self._reply.metrics):
            await self._reply(scope, receive, send)


class _BareResponse(Response):
    """Lets a route respond on bare ASGI; counts domain errors if `metrics` are given."""

    def __init__(
        self, app: EventFollower | Download, metrics: AgentMetrics | None = None, transfer_of: Session | None = None
    ) -> None:
        super().__init__()
        self._app = app
        self._metrics = metrics
        self._session = transfer_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transfer = contextlib.nullcontext() if self._session is None else self._session.files.transferring()
        with transfer, contextlib.nullcontext() if self._metrics is None else counted(self._metrics):
            await self._app(scope, receive, send)


def _as_list(text: str | None) -> list[str]:
    return [] if text is None else [text]


@contextmanager
def counted(metrics: AgentMetrics) -> Iterator[None]:
    """Count a domain error that the block raises."""
    try:
        yield
    except HypercoreError as error:
        metrics.errors.labels(error.type).inc()
        raise


def build_router(current: Callable[[], AgentServer]) -> APIRouter:
    """Return the routes; `current` returns the agent server of a request."""
    router = CheckedRouter()

    async def session_with_files(session_id: str) -> Session:
        session = current().enrolled().get(session_id)
        await session.fetch_files()
        return session

    @router.post("/v1/agent/chat", responses=_CHAT_ANSWERS)
    async def chat(request: Request) -> Response:
        with counted(current().metrics):
            placed = _placed(await request.body())
            sessions = current().serving(new=placed.placement.turn == 1)
            note_ids(
                request.scope,
                user_id=placed.user_id,
                session_id=placed.placement.session_id,
                agent_id=current().settings.agent_id,
                turn=placed.placement.turn,
            )
            turn, task = sessions.begin(placed, stream=placed.stream, span=span_of(request.scope))
        return _ChatResponse(ChatReply(turn, task, sessions.tasks, current().metrics))

    @router.get("/v1/agent/session/{session_id}")
    async def get_session(session_id: str) -> SessionView:
        with counted(current().metrics):
            return current().enrolled().get(session_id).view()

    @router.delete("/v1/agent/session/{session_id}")
    async def delete_session(session_id: str) -> SessionDeleted:
        with counted(current().metrics):
            notices = await current().enrolled().delete(session_id)
        return SessionDeleted(session_id=session_id, notices=notices)

    @router.post("/v1/agent/session/{session_id}/release")
    async def release_session(session_id: str) -> SessionDeleted:
        """Remove an idle session that is stored completely. For the manager only; users cannot call this route."""
        with counted(current().metrics):
            await current().enrolled().release(session_id)
        return SessionDeleted(session_id=session_id)

    @router.post("/v1/agent/session/{session_id}/interrupt")
    async def interrupt(session_id: str) -> InterruptResponse:
        with counted(current().metrics):
            interrupted = current().enrolled().interrupt(session_id)
        return InterruptResponse(session_id=session_id, interrupted=interrupted)

    @router.get("/v1/agent/session/{session_id}/events")
    async def list_events(
        session_id: str, after: EventsAfter = None, limit: EventsLimit = EVENTS_PAGE
    ) -> SessionEvents:
        """List the session's log, as the store has it."""
        with counted(current().metrics):
            return await current().enrolled().events(session_id, after, limit)

    @router.get("/v1/agent/session/{session_id}/events/stream")
    async def follow_events(
        session_id: str,
        last_event_id: Annotated[str | None, Header(max_length=64)] = None,
        held: Annotated[bool, Query(description="respond with 409 if an event after that one is missing here")] = False,
    ) -> Response:
        with counted(current().metrics):
            sessions = current().enrolled()
            ring, last = sessions.get(session_id).journal.ring, parse_id(last_event_id)
            if held and not ring.holds(last):
                raise Conflict("the events after that one are no longer on this agent; the session's log has them")
        return _BareResponse(EventFollower(ring, last, sessions.tasks))

    @router.get("/v1/agent/session/{session_id}/approvals")
    async def list_approvals(session_id: str) -> ApprovalList:
        with counted(current().metrics):
            sessions = current().enrolled()
            return sessions.approvals.list(sessions.get(session_id).session_id)

    @router.post("/v1/agent/session/{session_id}/approvals/{approval_id}")
    async def resolve_approval(session_id: str, approval_id: str, decision: ApprovalDecision) -> ApprovalResolved:
        with counted(current().metrics):
            sessions = current().enrolled()
            return sessions.approvals.resolve(sessions.get(session_id).session_id, approval_id, decision)

    @router.post("/v1/agent/session/{session_id}/open")
    async def open_session(session_id: str, opening: SessionOpening) -> SessionView:
        """Place a session here and fetch its files. For the manager only; users cannot call this route."""
        with counted(current().metrics):
            if opening.placement.session_id != session_id:
                raise InvalidRequest("placement.session_id: must be the path's", field="placement.session_id")
            session = await current().enrolled().open_with_files(opening)
        return session.view()

    @router.get("/v1/agent/session/{session_id}/files")
    async def list_files(session_id: str, after: FilePath | None = None, limit: FilesLimit = MOST_ENTRIES) -> FileList:
        with counted(current().metrics):
            session = await session_with_files(session_id)
            entries, more = await current().files().list(session.files.folder, after, limit)
        # Contents of a folder at the deepest level are never listed.
        cut = any(entry.type == "folder" and entry.path.count("/") >= MOST_LEVELS for entry in entries)
        return FileList(
            session_id=session_id, count=len(entries), files=entries, truncated=cut or more is not None, next=more
        )

    @router.get("/v1/agent/session/{session_id}/files/{path:any}")
    async def read_file(session_id: str, path: PathInUrl) -> Response:
        with counted(current().metrics):
            session = await session_with_files(session_id)
            return _BareResponse(Download(current().files(), session.files.folder, path), current().metrics, session)

    @router.put("/v1/agent/session/{session_id}/files/{path:any}")
    async def write_file(session_id: str, path: PathInUrl, request: Request) -> FileWritten:
        with counted(current().metrics):
            async with changing(session_id) as session:
                size = await current().files().write(session.files.folder, path, request.stream())
            missing = await saved(session)
        return FileWritten(
            session_id=session_id, path=path, size=size, workspace_durable=missing is None, notices=_as_list(missing)
        )

    @router.delete("/v1/agent/session/{session_id}/files/{path:any}")
    async def delete_file(session_id: str, path: PathInUrl) -> FileDeleted:
        with counted(current().metrics):
            async with changing(session_id) as session:
                await current().files().delete(session.files.folder, path)
            missing = await saved(session)
        return FileDeleted(
            session_id=session_id, path=path, workspace_durable=missing is None, notices=_as_list(missing)
        )

    @contextlib.asynccontextmanager
    async def changing(session_id: str) -> AsyncIterator[Session]:
        session = await session_with_files(session_id)
        session.files.archive.note_change()  # before the first byte, and again after the last
        try:
            with session.files.transferring():
                yield session
        finally:
            session.files.archive.note_change()

    async def saved(session: Session) -> str | None:
        missing = await session.files.save(_FILE_ARCHIVE_SECONDS)
        if session.files.archive.may_be_written_late:
            session.files.archive.note_change()
        return missing

    @router.get("/v1/agent/stats")
    async def stats() -> AgentLoad:
        sessions = current().enrolled()
        placed, live, running = sessions.counts()
        return AgentLoad(
            agent_id=current().settings.agent_id,
            sessions=placed,
            live=live,
            running=running,
            capacity=sessions.max_sessions,
            live_capacity=sessions.capacity.limit,
            memory_mb=round(sessions.memory_mb() + private_memory_mb(current().process_id)),
            memory_limit_mb=current().settings.memory_mb(),
            draining=sessions.draining,
            shares={
                "questions": ShareView(limit=sessions.approvals.limit, used=dict(sessions.approvals.count_by_user())),
                "starts": ShareView(limit=None, used=sessions.start_limiter.count_by_user()),
                "processes": ShareView(limit=sessions.capacity.per_user, used=dict(sessions.capacity.count_by_user())),
            },
        )

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str | bool]:
        return {
            "status": "ok",
            "agent_id": current().settings.agent_id,
            "state": current().state,
            "sessions_kept_apart": current().launcher is not None,
            "session_disk": launcher.session_disk if (launcher := current().launcher) is not None else "not limited",
            "tools": "on" if current().tools_off is None else f"off: {current().tools_off}",
        }

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> dict[str, str]:
        reason = current().not_ready()
        if reason is not None:
            raise Unavailable(reason, retry_after=1)
        return {"status": "ready", "agent_id": current().settings.agent_id}

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", responses=TEXT_RESPONSES)
    async def metrics_page() -> Response:
        return Response(current().render_metrics(), media_type=CONTENT_TYPE)

    return router


def endpoint_of(scope: Scope) -> str | None:
    """Return the label under which a request is counted, from a bounded set; None when it is not counted."""
    path: str = scope["path"]
    if path == "/v1/agent/chat":
        return "chat"
    if path == "/v1/agent/stats":
        return "stats"
    if path.startswith("/v1/agent/session/"):
        return "interrupt" if path.endswith("/interrupt") else "session"
    return None


def _placed(body: bytes) -> PlacedChatRequest:
    """Validate a chat request straight from its bytes; errors have the form of FastAPI's own."""
    try:
        return PlacedChatRequest.model_validate_json(body)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise RequestValidationError(faults) from None
