"""A user's decisions on tool calls that wait: relayed to the agent that holds the session."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from hypercore_agents.api.approvals import ApprovalDecision, ApprovalList, ApprovalResolved
from hypercore_agents.api.ids import SESSION_ID_PATTERN
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.relay import Limits, Relay
from hypercore_agents.manager.http.answers import RelayedAnswer
from hypercore_agents.manager.http.session_access import WithinAgent, WithinPool
from hypercore_agents.manager.sessions.sessions import Sessions, SessionScope

_LIMITS = Limits(answer=15, idle=15, total=20)
_ApprovalId = Annotated[str, Path(pattern=SESSION_ID_PATTERN)]
_LISTED: dict[int | str, dict[str, Any]] = {200: {"model": ApprovalList}}
_RESOLVED: dict[int | str, dict[str, Any]] = {200: {"model": ApprovalResolved}}


def approvals_router(sessions: Sessions, relay: Relay) -> APIRouter:
    """Return the routes under `/v1/agent` and, for one agent, under `/agents/AGENT_ID/v1/agent`."""
    router = CheckedRouter(tags=["sessions"])

    async def pass_on(session_id: str, within: SessionScope, path: str, body: bytes) -> Response:
        endpoint = await sessions.locate(session_id, within)

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

        return RelayedAnswer(write)

    @router.get("/v1/agent/session/{session_id}/approvals", response_model=None, responses=_LISTED)
    async def list_approvals(session_id: str, within: WithinPool) -> Response:
        """List the tool calls of this session that wait for a decision."""
        return await pass_on(session_id, within, "approvals", b"")

    @router.get("/agents/{agent_id}/v1/agent/session/{session_id}/approvals", response_model=None, responses=_LISTED)
    async def list_approvals_on_agent(session_id: str, within: WithinAgent) -> Response:
        """List the tool calls of this session on this agent that wait for a decision."""
        return await pass_on(session_id, within, "approvals", b"")

    @router.post("/v1/agent/session/{session_id}/approvals/{approval_id}", response_model=None, responses=_RESOLVED)
    async def resolve(
        session_id: str,
        approval_id: _ApprovalId,
        decision: ApprovalDecision,
        within: WithinPool,
    ) -> Response:
        """Allow a tool call, as it is or with another input, or deny it."""
        body = decision.model_dump_json(exclude_none=True).encode()
        return await pass_on(session_id, within, f"approvals/{approval_id}", body)

    @router.post(
        "/agents/{agent_id}/v1/agent/session/{session_id}/approvals/{approval_id}",
        response_model=None,
        responses=_RESOLVED,
    )
    async def resolve_on_agent(
        session_id: str,
        approval_id: _ApprovalId,
        decision: ApprovalDecision,
        within: WithinAgent,
    ) -> Response:
        """Allow a tool call on this agent, as it is or with another input, or deny it."""
        body = decision.model_dump_json(exclude_none=True).encode()
        return await pass_on(session_id, within, f"approvals/{approval_id}", body)

    return router
