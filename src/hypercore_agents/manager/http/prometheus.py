"""`GET /v1/prometheus/targets`: Prometheus' HTTP service discovery, one target per running agent.

No agent is scraped directly: the address is the manager's, as Prometheus itself asked for it (its `Host`), and the
path is the agent's page here (`/agents/AGENT_ID/metrics`), so a scrape needs nothing but a credential of scope
`metrics`. All targets share that address, so `instance` is the agent's id: else Prometheus would take the agents'
series for one another's. The scheme is left to the scrape configuration, which knows whether a proxy speaks TLS.

A draining agent is no target: the relay does not reach it, and its sessions are counted where they go.
"""

from fastapi import APIRouter, Request
from pydantic import BaseModel

from hypercore_agents.api.agents import AgentState
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.manager.http.auth import Who
from hypercore_agents.store import agents
from hypercore_agents.store.database import Database


class TargetGroup(BaseModel):
    """One entry of the list that Prometheus' `http_sd_configs` expects."""

    targets: list[str]
    labels: dict[str, str]


def prometheus_router(database: Database) -> APIRouter:
    """Return the discovery route."""
    router = CheckedRouter(tags=["health"])

    @router.get("/v1/prometheus/targets")
    async def targets(caller: Who, request: Request) -> list[TargetGroup]:
        """List every running agent as a target that is scraped through this manager."""
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
