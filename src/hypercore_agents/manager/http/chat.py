"""Chats and sessions, by the pool's address and by an agent's own: the same routes under two prefixes."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from hypercore_agents.api.chat import (
    SESSIONS_PAGE,
    ChatRequest,
    ChatResponse,
    InterruptResponse,
    SessionDeleted,
    SessionList,
    SessionsAfter,
    SessionsLimit,
)
from hypercore_agents.api.history import HISTORY_PAGE, HistoryBefore, HistoryCount, SessionDetail
from hypercore_agents.api.ids import UserId
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.relay import Limits, Relay
from hypercore_agents.manager.http.answers import IdempotencyKey, RelayedAnswer, replayed
from hypercore_agents.manager.http.auth import Caller, Who
from hypercore_agents.manager.http.session_access import WithinAgent, WithinPool
from hypercore_agents.manager.idempotency import Attempt, Idempotency, Recording, Stored
from hypercore_agents.manager.sessions.placement import BegunTurn
from hypercore_agents.manager.sessions.sessions import Sessions, SessionScope
from hypercore_agents.manager.sessions.turns import Turns

INTERRUPT_LIMITS = Limits(answer=15, idle=15, total=20)
_CHAT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatResponse,
        "content": {"text/event-stream": {}},
        "description": "the turn's result; with `stream`, server-sent events instead",
    }
}


def chat_router(turns: Turns, sessions: Sessions, relay: Relay, idempotency: Idempotency) -> APIRouter:
    """Return the routes under `/v1/agent` and, for one agent, under `/agents/AGENT_ID/v1/agent`."""
    router = CheckedRouter(tags=["sessions"])

    async def run_turn(
        request: Request, body: ChatRequest, caller: Caller, agent_id: str | None, key: str | None
    ) -> Response:
        caller.acting_for(body.user_id)
        if key is None:
            # A turn that has not begun is only carried out for somebody who left if that was asked for.
            goes_on = body.on_disconnect == "continue" and not body.stream
            gone = None if goes_on else request.is_disconnected
            return turn_answer(await turns.begin(body, agent_id=agent_id, gone=gone))
        route = "chat" if agent_id is None else f"chat:{agent_id}"
        attempt = await idempotency.begin(key, route=route, user_id=body.user_id, body=body)
        if isinstance(attempt, Stored):
            return replayed(attempt)
        assert isinstance(attempt, Attempt)
        try:
            turn = await turns.begin(body, agent_id=agent_id)
        except BaseException:
            await asyncio.shield(attempt.abandon())
            raise
        return turn_answer(turn, attempt)

    def turn_answer(turn: BegunTurn, attempt: Attempt | None = None) -> Response:
        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            await turns.run(turn, scope, receive, send, recording=None if attempt is None else Recording(attempt))

        return RelayedAnswer(write)

    async def interrupt_turn(session_id: str, within: SessionScope) -> Response:
        endpoint = await sessions.locate(session_id, within)

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

        return RelayedAnswer(write)

    @router.post("/v1/agent/chat", response_model=None, responses=_CHAT_ANSWERS)
    async def chat(
        request: Request, body: ChatRequest, caller: Who, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Run one turn of a session of the pool; without session_id, of a new one."""
        return await run_turn(request, body, caller, None, idempotency_key)

    @router.post("/agents/{agent_id}/v1/agent/chat", response_model=None, responses=_CHAT_ANSWERS)
    async def chat_on_agent(
        request: Request, agent_id: str, body: ChatRequest, caller: Who, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Run one turn of a session on this agent; without session_id, of a new one."""
        return await run_turn(request, body, caller, agent_id, idempotency_key)

    @router.get("/v1/agent/sessions")
    async def list_sessions(
        caller: Who,
        user_id: UserId | None = None,
        after: SessionsAfter | None = None,
        limit: SessionsLimit = SESSIONS_PAGE,
    ) -> SessionList:
        """List a page of the sessions that have not ended, most recently used first; `after`: an earlier `next`."""
        user = caller.acting_for(user_id)
        found, more = await sessions.list(SessionScope(user), after, limit)
        return SessionList(user_id=user, count=len(found), sessions=found, next=more)

    @router.get("/v1/agent/session/{session_id}")
    async def get_session(
        session_id: str,
        within: WithinPool,
        history: HistoryCount = HISTORY_PAGE,
        before: HistoryBefore = None,
    ) -> SessionDetail:
        """Show a session, wherever it is: state, usage, cost, and the newest messages of its conversation."""
        return await sessions.get(session_id, within, history=history, before=before)

    @router.get("/agents/{agent_id}/v1/agent/session/{session_id}")
    async def get_session_on_agent(
        session_id: str,
        within: WithinAgent,
        history: HistoryCount = HISTORY_PAGE,
        before: HistoryBefore = None,
    ) -> SessionDetail:
        """Show a session of this agent: state, usage, cost, and the newest messages of its conversation."""
        return await sessions.get(session_id, within, history=history, before=before)

    @router.delete("/v1/agent/session/{session_id}")
    async def delete_session(session_id: str, within: WithinPool) -> SessionDeleted:
        """End a session for good."""
        return await sessions.delete(session_id, within)

    @router.delete("/agents/{agent_id}/v1/agent/session/{session_id}")
    async def delete_session_on_agent(session_id: str, within: WithinAgent) -> SessionDeleted:
        """End a session of this agent for good."""
        return await sessions.delete(session_id, within)

    @router.post(
        "/v1/agent/session/{session_id}/interrupt", response_model=None, responses={200: {"model": InterruptResponse}}
    )
    async def interrupt(session_id: str, within: WithinPool) -> Response:
        """Interrupt the turn that runs, if one does."""
        return await interrupt_turn(session_id, within)

    @router.post(
        "/agents/{agent_id}/v1/agent/session/{session_id}/interrupt",
        response_model=None,
        responses={200: {"model": InterruptResponse}},
    )
    async def interrupt_on_agent(session_id: str, within: WithinAgent) -> Response:
        """Interrupt the turn that runs on this agent, if one does."""
        return await interrupt_turn(session_id, within)

    return router
