"""Routes of turns: `chat` begins one and relays its response, `interrupt` ends one."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from hypercore_agents.api.chat import ChatRequest, ChatResponse, InterruptResponse
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.relay import Relay, RequestLimits
from hypercore_agents.manager.http.auth import RequestCaller
from hypercore_agents.manager.http.responses import IdempotencyKey, RelayedResponse, replayed
from hypercore_agents.manager.http.session_access import Access, agent_in_path, session_route
from hypercore_agents.manager.idempotency import Attempt, Idempotency, Recording, Stored
from hypercore_agents.manager.sessions.sessions import Sessions
from hypercore_agents.manager.sessions.turn_relay import TurnRelay
from hypercore_agents.manager.sessions.turns import BegunTurn, Turns

INTERRUPT_LIMITS = RequestLimits(response=15, idle=15, total=20)
_CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatResponse,
        "content": {"text/event-stream": {}},
        "description": "the turn's result; with `stream`, server-sent events instead",
    }
}
_INTERRUPTED: dict[int | str, dict[str, Any]] = {200: {"model": InterruptResponse}}


def chat_router(
    turns: Turns, turn_relay: TurnRelay, sessions: Sessions, relay: Relay, idempotency: Idempotency
) -> APIRouter:
    """Return the routes `chat` and `session/{session_id}/interrupt`."""
    router = CheckedRouter(tags=["sessions"])

    @session_route(router, "POST", "/chat", response_model=None, responses=_CHAT_RESPONSES)
    async def chat(
        request: Request, body: ChatRequest, caller: RequestCaller, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Run one turn of a session. Without session_id, a new session is created, on the agent in the path if any."""
        caller.acting_for(body.user_id)
        agent_id = agent_in_path(request)
        if idempotency_key is None:
            # A queued turn of a disconnected client begins only if its client asked for that.
            continues = body.on_disconnect == "continue" and not body.stream
            gone = None if continues else request.is_disconnected
            return response_of(await turns.begin(body, agent_id=agent_id, gone=gone))
        route = "chat" if agent_id is None else f"chat:{agent_id}"
        attempt = await idempotency.begin(idempotency_key, route=route, user_id=body.user_id, body=body)
        if isinstance(attempt, Stored):
            return replayed(attempt)
        assert isinstance(attempt, Attempt)
        try:
            turn = await turns.begin(body, agent_id=agent_id)
        except BaseException:
            await asyncio.shield(attempt.abandon())
            raise
        return response_of(turn, attempt)

    def response_of(turn: BegunTurn, attempt: Attempt | None = None) -> Response:
        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            recording = None if attempt is None else Recording(attempt)
            await turn_relay.run(turn, scope, receive, send, recording=recording)

        return RelayedResponse(write)

    @session_route(router, "POST", "/session/{session_id}/interrupt", response_model=None, responses=_INTERRUPTED)
    async def interrupt(session_id: str, access: Access) -> Response:
        """Interrupt the session's running turn, if there is one."""
        endpoint = await sessions.locate(session_id, access)

        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            await relay.relay(
                scope,
                receive,
                send,
                url=f"{endpoint.address}/v1/agent/session/{session_id}/interrupt",
                headers=[("authorization", f"Bearer {endpoint.bearer}")],
                drop=("cookie", "content-type"),
                body=b"",
                limits=INTERRUPT_LIMITS,
            )

        return RelayedResponse(write)

    return router
