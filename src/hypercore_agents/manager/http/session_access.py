"""Which sessions a request may access, and the two prefixes under which every session route is mounted.

Under `/v1/agent` a route serves all sessions of its caller, wherever they are placed; under
`/agents/AGENT_ID/v1/agent` it serves only those that are placed on that agent.
"""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request

from hypercore_agents.api.errors import NotFound
from hypercore_agents.api.ids import UserId
from hypercore_agents.manager.http.auth import RequestCaller
from hypercore_agents.manager.sessions.access import SessionAccess

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


async def _declare_agent_id(agent_id: str) -> None:
    """Declare the path parameter in the OpenAPI document; `agent_in_path` reads it."""


PREFIXES = (
    ("/v1/agent", ()),
    ("/agents/{agent_id}/v1/agent", (Depends(_declare_agent_id),)),
)
"""Prefixes of session routes, with the dependencies that each adds."""


def session_route(router: APIRouter, method: str, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
    """Mount a route under each of `PREFIXES`. Options are those of `APIRouter.add_api_route`."""

    def mount(endpoint: Endpoint) -> Endpoint:
        for prefix, dependencies in PREFIXES:
            router.add_api_route(prefix + path, endpoint, methods=[method], dependencies=dependencies, **options)
        return endpoint

    return mount


def agent_in_path(request: Request) -> str | None:
    """Return the agent that the path names; None under the pool's prefix."""
    agent_id: str | None = request.path_params.get("agent_id")
    return agent_id


async def _session_access(request: Request, caller: RequestCaller, user_id: UserId | None = None) -> SessionAccess:
    """Return what the caller may access. Another user's session is not found, rather than forbidden."""
    user = caller.acting_for(None)
    if user is not None and user_id is not None and user != user_id:
        raise NotFound("there is no such session")
    return SessionAccess(user_id=user or user_id, agent_id=agent_in_path(request))


Access = Annotated[SessionAccess, Depends(_session_access)]
"""Parameter of session routes: what the request may access. It adds the query parameter `user_id`."""
