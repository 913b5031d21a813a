"""Every route of the manager, requested with another user's token, with no token, and with a metrics token.

The table of requests is checked against the application's own routes, so that a new route without an entry fails.
"""

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI
from fastapi.routing import APIRoute
from joserfc import jwt
from joserfc.jwk import OctKey

from hypercore_agents.manager.app import create_app
from hypercore_agents.manager.sessions import follow
from support.manager_server import Deployment, deployed, settings_for
from support.waiting import until

APPROVAL = "12936c0e-a954-44cb-a99a-51079215ae3e"
SECRET = "a-secret-of-more-than-thirty-two-bytes"

DOCUMENTS = ("/docs", "/docs/oauth2-redirect", "/redoc")
BY_AGENT = ("/v1/agents/get", "/v1/agents/logs", "/v1/agents/delete")
OPEN = {"/health", "/ready"}
"""Public routes, which contain no user's data."""

CHAT = {"prompt": "hi", "session_id": "{session_id}"}
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/agents/spawn": {},
    "POST /v1/agent/chat": CHAT,
    "POST /agents/{agent_id}/v1/agent/chat": CHAT,
    "POST /v1/agent/session/{session_id}/approvals/{approval_id}": {"decision": "allow"},
    "POST /agents/{agent_id}/v1/agent/session/{session_id}/approvals/{approval_id}": {"decision": "allow"},
    "PUT /v1/agent/session/{session_id}/files/{path:any}": {},
    "PUT /agents/{agent_id}/v1/agent/session/{session_id}/files/{path:any}": {},
    "PUT /v1/pool": {"desired": 1, "version": 0},
    "POST /v1/pool/roll": {},
}
"""Bodies of the routes that have one. `user_id` is added to those that name a user."""

NAMES_A_USER = {"POST /v1/agents/spawn", "POST /v1/agent/chat", "POST /agents/{agent_id}/v1/agent/chat"}
OF_THE_OPERATOR = ("/v1/agents/stats", "/v1/pool", "/v1/pool/roll", "/v1/prometheus/targets", "/metrics")
OWN_LIST = ("GET /v1/agents/list", "GET /v1/agent/sessions", "GET /v1/usage")
"""Routes that return the caller's own resources if no user is named."""


def routes_of(folder: Path) -> list[str]:
    from hypercore_agents.compute.testing import MemoryBackend, MemoryHost

    app: Any = create_app(settings_for(folder), backend=MemoryBackend(MemoryHost()))
    while not isinstance(app, FastAPI):
        app = app._app
    found = [
        f"{method} {route.path}" for route in _all(app.routes) for method in route.methods or () if method != "HEAD"
    ]
    assert len(found) > 20
    # Deletions come last, so that the other routes find their resources.
    return sorted(
        (name for name in found if name.split()[1] not in OPEN and not name.endswith(DOCUMENTS)),
        key=lambda name: (name.startswith("DELETE"), "agents/delete" in name, "files/" not in name),
    )


def _all(routes: Iterable[Any]) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (included := getattr(route, "original_router", None)) is not None:
            yield from _all(included.routes)


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state", min_agents=1, enable_auth=True, jwt_secret=SECRET) as running:
        await until_warm(running)
        yield running


async def until_warm(running: Deployment) -> None:
    async def warm() -> bool:
        _, stats = await running.call("GET", "/v1/agents/stats", headers=token("root", "admin"))
        return bool(stats["pool"]["running"] == 1)

    await until(warm, seconds=20)


def token(user_id: str, scope: str = "user") -> dict[str, str]:
    claims = {"sub": user_id, "scope": scope, "exp": int(time.time()) + 600}
    return {"authorization": f"Bearer {jwt.encode({'alg': 'HS256'}, claims, OctKey.import_key(SECRET))}"}


class Ada:
    """A user with a dedicated agent, a session on it, and a session in the pool."""

    def __init__(self, site: Deployment) -> None:
        self.site = site
        self.agent_id = ""
        self.on_agent = ""
        self.in_pool = ""

    async def move_in(self) -> None:
        call, headers = self.site.call, token("ada")
        status, agent = await call("POST", "/v1/agents/spawn", {"user_id": "ada"}, headers=headers)
        assert status == 200, agent
        self.agent_id = agent["agent_id"]
        said = {"user_id": "ada", "prompt": "hello"}
        self.in_pool = (await call("POST", "/v1/agent/chat", said, headers=headers))[1]["session_id"]
        path = f"/agents/{self.agent_id}/v1/agent/chat"
        self.on_agent = (await call("POST", path, said, headers=headers))[1]["session_id"]

    async def ask(self, route: str, headers: dict[str, str], *, named: str | None) -> tuple[int, Any]:
        """Send a route's request for her resources; `named`: the user in the request."""
        method, path = route.split()
        session_id = self.on_agent if path.startswith("/agents/") else self.in_pool
        ids = {
            "session_id": session_id,
            "agent_id": self.agent_id,
            "approval_id": APPROVAL,
            "path:any": "file",
        }
        body = BODIES.get(route)
        if body is not None:
            body = {name: ids.get(str(value).strip("{}"), value) for name, value in body.items()}
            if route in NAMES_A_USER:
                body["user_id"] = named or "bob"
        params = (
            {"agent_id": self.agent_id} if path in ("/v1/agents/get", "/v1/agents/logs", "/v1/agents/delete") else {}
        )
        takes_a_user = route in OWN_LIST or "/v1/agent/session" in path
        if named is not None and method == "GET" and takes_a_user:
            params["user_id"] = named
        for name, value in ids.items():
            path = path.replace(f"{{{name}}}", value)
        return await self.site.call(method, path, body, headers=headers, **params)

    async def state(self) -> tuple[Any, ...]:
        """Return what must not change: her agents, her sessions, the requests that her agents received."""
        headers = token("ada")
        agents = (await self.site.call("GET", "/v1/agents/list", headers=headers))[1]
        sessions = (await self.site.call("GET", "/v1/agent/sessions", headers=headers))[1]
        told = [
            (agent.agent_id, len(agent.chats), len(agent.deleted), len(agent.interrupted), agent.files)
            for agent in self.site.agents.running.values()
        ]
        return agents, sessions, sorted(told)


async def test_no_route_exposes_another_users_resources(guarded: Deployment, tmp_path: Path) -> None:
    ada = Ada(guarded)
    await ada.move_in()
    before = await ada.state()
    routes = routes_of(tmp_path / "other")
    takes_a_body = {route for route in routes if route.split()[0] in ("POST", "PUT") and "interrupt" not in route}
    assert takes_a_body == set(BODIES), "a new route with a body needs an entry in BODIES"
    for route in routes:
        for named in ("ada", None):
            if named is None and route in (*OWN_LIST, "POST /v1/agents/spawn"):
                continue  # his own resources
            status, answer = await ada.ask(route, token("bob"), named=named)
            assert status in (403, 404), (route, named, status, answer)
            assert answer["error"]["type"] in ("forbidden", "not_found"), (route, named, answer)
        status, answer = await ada.ask(route, {}, named="ada")
        assert status == 401, (route, status, answer)
        if not route.startswith("GET") or "metrics" not in route:
            status, answer = await ada.ask(route, token("x", "metrics"), named="ada")
            metrics_are_meant = route == "GET /v1/prometheus/targets"
            assert status == (200 if metrics_are_meant else 403) or (status == 404 and not metrics_are_meant), (
                route,
                status,
                answer,
            )
    for route in OWN_LIST:
        status, answer = await ada.ask(route, token("bob"), named=None)
        assert status == 200, (route, answer)
        assert ada.agent_id not in str(answer)
        assert ada.in_pool not in str(answer)
    assert await ada.state() == before


async def test_the_same_requests_succeed_for_their_own_user(
    guarded: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above would prove nothing."""
    ada = Ada(guarded)
    await ada.move_in()
    monkeypatch.setattr(follow, "STREAM_SECONDS", 0.2)
    for route in routes_of(tmp_path / "other"):
        if "approval" in route:
            continue  # no tool call waits there
        operators = route.split()[1] in OF_THE_OPERATOR
        status, answer = await ada.ask(route, token("root", "admin") if operators else token("ada"), named="ada")
        assert status < 300 or (route == "DELETE /v1/pool/roll" and status in (404, 409)), (route, status, answer)
