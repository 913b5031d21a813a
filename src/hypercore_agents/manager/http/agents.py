"""Routes of agents: spawn, list, get, delete, stats. A spawn that waits answers 200, one that does not 202."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from hypercore_agents.api.agents import AgentDeleted, AgentList, AgentView, SpawnRequest, StatsView
from hypercore_agents.api.ids import UserId
from hypercore_agents.manager.fleet.agents import Agents
from hypercore_agents.manager.http.auth import Who


def agents_router(agents: Agents) -> APIRouter:
    """Return the routes under `/v1/agents`."""
    router = APIRouter(prefix="/v1/agents", tags=["agents"])

    @router.post("/spawn", responses={202: {"model": AgentView, "description": "not awaited: it is being started"}})
    async def spawn(
        body: SpawnRequest,
        caller: Who,
        response: Response,
        wait: Annotated[bool, Query(description="answer when the agent is ready; false: at once, with 202")] = True,
    ) -> AgentView:
        """Start an agent of one's own."""
        caller.acting_for(body.user_id)
        row = await agents.spawn(body)
        if wait:
            row = await agents.until_running(row.agent_id)
        else:
            response.status_code = 202
        return await agents.view(row)

    @router.get("/list")
    async def list_agents(caller: Who, user_id: UserId | None = None) -> AgentList:
        """List live agents, oldest first: a user's own, or (admin, without user_id) all, the pool's included."""
        return await agents.list(caller.acting_for(user_id))

    @router.get("/get")
    async def get(agent_id: str, caller: Who) -> AgentView:
        """Show an agent, also one that is over."""
        return await agents.view(await agents.get(agent_id, user_id=caller.acting_for(None)))

    @router.delete("/delete")
    async def delete(agent_id: str, caller: Who) -> AgentDeleted:
        """Stop an agent, end its sessions, and answer when its sandbox is gone."""
        row = await agents.delete(agent_id, user_id=caller.acting_for(None))
        return AgentDeleted(agent_id=row.agent_id, status=row.state)

    @router.get("/stats")
    async def stats(caller: Who) -> StatsView:
        """Count agents, sessions and capacity."""
        caller.needs_admin()
        return await agents.stats()

    return router
