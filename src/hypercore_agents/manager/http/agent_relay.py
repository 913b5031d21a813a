"""Relays the pages of an agent (health, metrics, statistics) listed in a fixed table. Chats: `chat.py`.

The upstream URL is built from the table and an agent id found in the store, never from the path of the request.
"""

from fastapi import APIRouter, Response

from hypercore_agents.api.agents import AgentKind
from hypercore_agents.api.errors import Forbidden, NotFound
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.errors import TEXT_RESPONSES
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.relay import Relay, RequestLimits
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.http.auth import Caller, RequestCaller
from hypercore_agents.manager.http.responses import RelayedResponse

RELAYED = ("/v1/agent/stats", "/health", "/ready", "/metrics")
LIMITS = RequestLimits(response=10, idle=10, total=20, response_bytes=16 * 1024 * 1024)


def agent_relay_router(directory: AgentDirectory, relay: Relay) -> APIRouter:
    """Return the relayed routes under `/agents/AGENT_ID`."""
    router = CheckedRouter(prefix="/agents/{agent_id}", tags=["agent pages"])

    def add_page(path: str) -> None:
        async def page(agent_id: str, caller: RequestCaller) -> Response:
            endpoint = _accessible(await directory.look_up(agent_id), caller, path)

            async def write(scope: Scope, receive: Receive, send: Send) -> None:
                await relay.relay(
                    scope,
                    receive,
                    send,
                    url=endpoint.address + path,
                    headers=[("authorization", f"Bearer {endpoint.bearer}")],
                    drop=("cookie",),
                    body=b"",
                    limits=LIMITS,
                )

            return RelayedResponse(write)

        name = path.strip("/").replace("/", "_")
        router.add_api_route(
            path,
            page,
            methods=["GET"],
            response_model=None,
            name=f"agent_{name}",
            summary=f"The agent's own {path}",
            responses=TEXT_RESPONSES if path == "/metrics" else None,
        )

    for path in RELAYED:
        add_page(path)
    return router


def _accessible(endpoint: Endpoint, caller: Caller, path: str) -> Endpoint:
    own = endpoint.kind is AgentKind.DEDICATED and endpoint.user_id == caller.user_id
    if caller.scope == "user" and not own:
        raise NotFound(f"there is no agent {endpoint.agent_id}")
    if caller.scope == "metrics" and path != "/metrics":
        raise Forbidden("this credential gives access to metrics only")
    return endpoint
