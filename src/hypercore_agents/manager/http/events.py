"""A session's events: listed from the store, and followed as they come, wherever the session is."""

import asyncio
import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response

from hypercore_agents.api.events import EVENTS_PAGE, EventId, EventsAfter, EventsLimit, SessionEvents, parse_id
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.raw_response import cut
from hypercore_agents.manager.http.answers import RelayedAnswer
from hypercore_agents.manager.http.session_access import WithinAgent, WithinPool
from hypercore_agents.manager.open_responses import OpenResponses
from hypercore_agents.manager.sessions import follow
from hypercore_agents.manager.sessions.follow import EventStreams
from hypercore_agents.manager.sessions.sessions import Sessions, SessionScope

WRITE_SECONDS = 60.0
"""How long one write may wait for a client that does not read."""
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "server-sent events"}
}
_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_LastId = Annotated[str | None, Header(max_length=64, description="id of the event that was seen last")]


def events_router(sessions: Sessions, streams: EventStreams, opened: OpenResponses) -> APIRouter:
    """Return the routes under `/v1/agent` and, for one agent, under `/agents/AGENT_ID/v1/agent`."""
    router = CheckedRouter(tags=["sessions"])

    async def follow_events(session_id: str, within: SessionScope, last: EventId | None) -> Response:
        user_id = (await streams.find(session_id, within)).user_id

        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            with opened.open(user_id):
                await write_until_gone(scope, receive, send)

        async def write_until_gone(scope: Scope, receive: Receive, send: Send) -> None:
            gone = asyncio.create_task(_until_gone(receive), name="events.watch-client")
            writing = asyncio.create_task(tell(session_id, within, last, scope, send), name="events.write")
            try:
                await asyncio.wait((gone, writing), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                writing.cancel()
                await asyncio.wait((gone, writing))
            if not writing.cancelled():
                writing.result()

        return RelayedAnswer(write)

    async def tell(session_id: str, within: SessionScope, last: EventId | None, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(follow.STREAM_SECONDS),
                contextlib.aclosing(streams.follow(session_id, within, last)) as told,
            ):
                async for frames in told:
                    if not await _written(scope, send, frames, more=True):
                        return
        await _written(scope, send, b"", more=False)

    @router.get("/v1/agent/session/{session_id}/events")
    async def list_events(
        session_id: str,
        within: WithinPool,
        after: EventsAfter = None,
        limit: EventsLimit = EVENTS_PAGE,
    ) -> SessionEvents:
        """List the events of a session, wherever it is, in order; a page of them. Texts come whole, without deltas."""
        return await sessions.events(session_id, within, parse_id(after), limit)

    @router.get("/agents/{agent_id}/v1/agent/session/{session_id}/events")
    async def list_events_on_agent(
        session_id: str,
        within: WithinAgent,
        after: EventsAfter = None,
        limit: EventsLimit = EVENTS_PAGE,
    ) -> SessionEvents:
        """List the events of a session of this agent in order; a page of them. Texts come whole, without deltas."""
        return await sessions.events(session_id, within, parse_id(after), limit)

    @router.get("/v1/agent/session/{session_id}/events/stream", response_model=None, responses=_EVENTS)
    async def stream_events(session_id: str, within: WithinPool, last_event_id: _LastId = None) -> Response:
        """Follow the events of a session, wherever it is and goes, from the one in `Last-Event-ID`."""
        return await follow_events(session_id, within, parse_id(last_event_id))

    @router.get(
        "/agents/{agent_id}/v1/agent/session/{session_id}/events/stream", response_model=None, responses=_EVENTS
    )
    async def stream_events_on_agent(session_id: str, within: WithinAgent, last_event_id: _LastId = None) -> Response:
        """Follow the events of a session of this agent, from the one in `Last-Event-ID`."""
        return await follow_events(session_id, within, parse_id(last_event_id))

    return router


async def _written(scope: Scope, send: Send, body: bytes, *, more: bool) -> bool:
    """Send a part of the answer; False when the client did not read for too long, and its connection was ended."""
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        cut(scope)
        return False
    return True


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
