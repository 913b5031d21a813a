"""`GET /v1/prometheus/targets`: HTTP service discovery for Prometheus, one target per running agent.

Prometheus scrapes agents through the manager: the address is the `Host` of its own request, and the path is the agent's
page (`/agents/AGENT_ID/metrics`). A scrape therefore needs only a credential of scope `metrics`. All targets share one
address, so `instance` is set to the agent's id; otherwise the agents' series would collide. The scrape configuration
sets the scheme, because only the operator knows whether a proxy terminates TLS.

A draining agent is not a target: the relay does not reach it, and its sessions are counted on the agents they move to.
"""

from fastapi import APIRouter, Request
from pydantic import BaseModel

from hypercore_agents.api.agents import AgentState
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.manager.http.auth import RequestCaller
from hypercore_agents.store import agents
from hypercore_agents.store.database import Database


class TargetGroup(BaseModel):
    """One entry of the list that `http_sd_configs` of Prometheus expects."""

    targets: list[str]
    labels: dict[str, str]


def prometheus_router(database: Database) -> APIRouter:
    """Return the discovery route."""
    router = CheckedRouter(tags=["health"])

    @router.get("/v1/prometheus/targets")
    async def targets(caller: RequestCaller, request: Request) -> list[TargetGroup]:
        """List every running agent as a target, scraped through this manager."""
        caller.needs_metrics()
        async with database.read() as connection:
            rows = await agents.list_agents(connection, states=[AgentState.RUNNING])
        here = request.headers["host"]
        return [
            TargetGroup(
                targets=[here],
                labels={
                    "__metrics_path__": f"/agents/{row.agent_id}/metrics",
                    "instance": row.agent_id,
                    "kind": row.kind.value,
                    "backend": row.backend,
                },
            )
            for row in rows
        ]

    return router
