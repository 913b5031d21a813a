"""Routes of a user's decisions on waiting tool calls, relayed to the session's agent."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from hypercore_agents.api.approvals import ApprovalDecision, ApprovalList, ApprovalResolved
from hypercore_agents.api.ids import SESSION_ID_PATTERN
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.relay import Relay, RequestLimits
from hypercore_agents.manager.http.responses import RelayedResponse
from hypercore_agents.manager.http.session_access import Access, session_route
from hypercore_agents.manager.sessions.access import SessionAccess
from hypercore_agents.manager.sessions.sessions import Sessions

_LIMITS = RequestLimits(response=15, idle=15, total=20)
_ApprovalId = Annotated[str, Path(pattern=SESSION_ID_PATTERN)]
_LISTED: dict[int | str, dict[str, Any]] = {200: {"model": ApprovalList}}
_RESOLVED: dict[int | str, dict[str, Any]] = {200: {"model": ApprovalResolved}}


def approvals_router(sessions: Sessions, relay: Relay) -> APIRouter:
    """Return the routes `session/{session_id}/approvals`."""
    router = CheckedRouter(tags=["sessions"])

    async def relay_to_agent(session_id: str, access: SessionAccess, path: str, body: bytes) -> Response:
        endpoint = await sessions.locate(session_id, access)

        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            await relay.relay(
                scope,
                receive,
                send,
                url=f"{endpoint.address}/v1/agent/session/{session_id}/{path}",
                headers=[("authorization", f"Bearer {endpoint.bearer}"), ("content-type", "application/json")],
                drop=("cookie",),
                body=body,
                limits=_LIMITS,
            )

        return RelayedResponse(write)

    @session_route(router, "GET", "/session/{session_id}/approvals", response_model=None, responses=_LISTED)
    async def list_approvals(session_id: str, access: Access) -> Response:
        """List the session's tool calls that wait for a decision."""
        return await relay_to_agent(session_id, access, "approvals", b"")

    @session_route(
        router, "POST", "/session/{session_id}/approvals/{approval_id}", response_model=None, responses=_RESOLVED
    )
    async def resolve(
        session_id: str, approval_id: _ApprovalId, decision: ApprovalDecision, access: Access
    ) -> Response:
        """Allow a tool call, with its own or another input, or deny it."""
        body = decision.model_dump_json(exclude_none=True).encode()
        return await relay_to_agent(session_id, access, f"approvals/{approval_id}", body)

    return router
