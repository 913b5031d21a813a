"""What the manager passes on to one agent as it is: its pages, by a fixed table. Chats and sessions: `chat.py`.

The agent's URL is made from the table and an id that was found in the store, never from the path that was asked for.
"""

from fastapi import APIRouter, Response

from hypercore_agents.api.agents import AgentKind
from hypercore_agents.api.errors import Forbidden, NotFound
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.errors import TEXT_RESPONSES
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.relay import Limits, Relay
from hypercore_agents.manager.fleet.directory import AgentDirectory, Endpoint
from hypercore_agents.manager.http.auth import Caller, Who
from hypercore_agents.manager.http.responses import RelayedResponse

RELAYED = ("/v1/agent/stats", "/health", "/ready", "/metrics")
LIMITS = Limits(answer=10, idle=10, total=20, answer_bytes=16 * 1024 * 1024)


def agent_relay_router(directory: AgentDirectory, relay: Relay) -> APIRouter:
    """Return the routes under `/agents/AGENT_ID` that are passed on."""
    router = CheckedRouter(prefix="/agents/{agent_id}", tags=["agent pages"])

    def passing(path: str) -> None:
        async def page(agent_id: str, caller: Who) -> Response:
            endpoint = _within_reach(await directory.look_up(agent_id), caller, path)

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
        passing(path)
    return router


def _within_reach(endpoint: Endpoint, caller: Caller, path: str) -> Endpoint:
    own = endpoint.kind is AgentKind.DEDICATED and endpoint.user_id == caller.user_id
    if caller.scope == "user" and not own:
        raise NotFound(f"there is no agent {endpoint.agent_id}")
    if caller.scope == "metrics" and path != "/metrics":
        raise Forbidden("this credential reaches metrics only")
    return endpoint
