"""Routes of agents: spawn, list, get, delete, logs, stats."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Response

from hypercore_agents.api.agents import AgentDeleted, AgentList, AgentView, SpawnRequest, StatsView
from hypercore_agents.api.ids import UserId
from hypercore_agents.http.errors import TEXT_RESPONSES
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.manager.fleet.agents import Agents
from hypercore_agents.manager.http.auth import RequestCaller
from hypercore_agents.manager.http.responses import IdempotencyKey, replayed
from hypercore_agents.manager.idempotency import Attempt, Created, Idempotency, Stored
from hypercore_agents.manager.open_responses import OpenResponses
from hypercore_agents.store.agents import AgentRow

LOG_LIMIT = 1024 * 1024
"""Maximum bytes of a log in one response."""


def agents_router(agents: Agents, idempotency: Idempotency, open_responses: Sequence[OpenResponses]) -> APIRouter:
    """Return the routes under `/v1/agents`."""
    router = CheckedRouter(prefix="/v1/agents", tags=["agents"])

    @router.post(
        "/spawn",
        response_model=AgentView,
        responses={202: {"model": AgentView, "description": "with `wait=false`: the agent is starting"}},
    )
    async def spawn(
        body: SpawnRequest,
        caller: RequestCaller,
        response: Response,
        wait: Annotated[bool, Query(description="respond when the agent is ready; false: at once, with 202")] = True,
        idempotency_key: IdempotencyKey = None,
    ) -> Response | AgentView:
        """Start a dedicated agent."""
        caller.acting_for(body.user_id)
        response.status_code = 200 if wait else 202
        if idempotency_key is None:
            return await agents.view(await started((await agents.spawn(body)).agent_id, wait))
        secret = body.anthropic_api_key.get_secret_value() if body.anthropic_api_key is not None else ""
        first = await idempotency.begin(
            idempotency_key, route="spawn", user_id=body.user_id, body=body, secrets=f"{secret} {wait}"
        )
        if isinstance(first, Stored):
            return replayed(first)
        if isinstance(first, Created):
            attempt, agent_id = first.attempt, first.identity
        else:
            attempt, agent_id = first, await spawned(body, first)
        view = await agents.view(await started(agent_id, wait))
        content = view.model_dump_json(exclude_none=True).encode()
        await attempt.store_response(response.status_code, "application/json", content)
        return view

    async def spawned(body: SpawnRequest, attempt: Attempt) -> str:
        try:
            row = await agents.spawn(body)
        except BaseException:
            await asyncio.shield(attempt.abandon())
            raise
        await attempt.record_created(row.agent_id)
        return row.agent_id

    async def started(agent_id: str, wait: bool) -> AgentRow:
        return await (agents.until_running(agent_id) if wait else agents.get(agent_id))

    @router.get("/list")
    async def list_agents(caller: RequestCaller, user_id: UserId | None = None) -> AgentList:
        """List live agents, oldest first: those of a user or, for an admin without user_id, all of them and the
        pool's."""
        return await agents.list(caller.acting_for(user_id))

    @router.get("/get")
    async def get(agent_id: str, caller: RequestCaller) -> AgentView:
        """Show an agent, including one that has ended."""
        return await agents.view(await agents.get(agent_id, user_id=caller.acting_for(None)))

    @router.get("/logs", response_model=None, responses=TEXT_RESPONSES)
    async def logs(
        agent_id: str,
        caller: RequestCaller,
        limit: Annotated[int, Query(ge=1, le=LOG_LIMIT, description="bytes, from the end")] = 65536,
    ) -> Response:
        """Return the end of an agent's log as text, to its owner or an admin."""
        log = await agents.logs(agent_id, user_id=caller.acting_for(None), limit=limit)
        return Response(log, media_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"})

    @router.delete("/delete")
    async def delete(agent_id: str, caller: RequestCaller) -> AgentDeleted:
        """Stop an agent and end its sessions. Responds when its sandbox is gone."""
        row = await agents.delete(agent_id, user_id=caller.acting_for(None))
        return AgentDeleted(agent_id=row.agent_id, status=row.state)

    @router.get("/stats")
    async def stats(caller: RequestCaller) -> StatsView:
        """Count agents, sessions and capacity."""
        caller.needs_admin()
        stats = await agents.stats()
        stats.shares |= {kind.share: kind.view() for kind in open_responses}
        return stats

    return router
