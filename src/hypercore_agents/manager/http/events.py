"""Routes of a session's events: a list from the store, and a stream that follows the session between agents."""

import asyncio
import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response

from hypercore_agents.api.events import EVENTS_PAGE, EventId, EventsAfter, EventsLimit, SessionEvents, parse_id
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.raw_response import abort_connection
from hypercore_agents.manager.http.responses import RelayedResponse
from hypercore_agents.manager.http.session_access import Access, session_route
from hypercore_agents.manager.open_responses import OpenResponses
from hypercore_agents.manager.sessions import follow
from hypercore_agents.manager.sessions.access import SessionAccess
from hypercore_agents.manager.sessions.follow import EventStreams
from hypercore_agents.manager.sessions.sessions import Sessions

WRITE_SECONDS = 60.0
"""Maximum wait of one write for a client that does not read."""
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "server-sent events"}
}
_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_LastId = Annotated[str | None, Header(max_length=64, description="id of the last event that the client received")]


def events_router(sessions: Sessions, streams: EventStreams, opened: OpenResponses) -> APIRouter:
    """Return the routes `session/{session_id}/events` and `session/{session_id}/events/stream`."""
    router = CheckedRouter(tags=["sessions"])

    @session_route(router, "GET", "/session/{session_id}/events")
    async def list_events(
        session_id: str, access: Access, after: EventsAfter = None, limit: EventsLimit = EVENTS_PAGE
    ) -> SessionEvents:
        """List the events of a session in order, in pages. Texts are complete; there are no deltas."""
        return await sessions.events(session_id, access, parse_id(after), limit)

    @session_route(router, "GET", "/session/{session_id}/events/stream", response_model=None, responses=_EVENTS)
    async def stream_events(session_id: str, access: Access, last_event_id: _LastId = None) -> Response:
        """Stream the events of a session from the one after `Last-Event-ID`, also while the session moves."""
        last = parse_id(last_event_id)
        user_id = (await streams.find(session_id, access)).user_id

        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            with opened.open(user_id):
                await write_until_disconnect(scope, receive, send)

        async def write_until_disconnect(scope: Scope, receive: Receive, send: Send) -> None:
            gone = asyncio.create_task(_until_disconnect(receive), name="events.watch-client")
            writing = asyncio.create_task(write_events(session_id, access, last, scope, send), name="events.write")
            try:
                await asyncio.wait((gone, writing), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                writing.cancel()
                await asyncio.wait((gone, writing))
            if not writing.cancelled():
                writing.result()

        return RelayedResponse(write)

    async def write_events(
        session_id: str, access: SessionAccess, last: EventId | None, scope: Scope, send: Send
    ) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(follow.STREAM_SECONDS),
                contextlib.aclosing(streams.follow(session_id, access, last)) as events,
            ):
                async for frames in events:
                    if not await _written(scope, send, frames, more=True):
                        return
        await _written(scope, send, b"", more=False)

    return router


async def _written(scope: Scope, send: Send, body: bytes, *, more: bool) -> bool:
    """Send a part of the response. False: the client did not read in time, and its connection was closed."""
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        abort_connection(scope)
        return False
    return True


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
