"""A served manager for tests, with a backend in memory and stand-in agents that are served on loopback.

`Agents` is the machine on which a `MemoryBackend` starts sandboxes. Each agent enrols like a real one, with its
enrolment secret, but directly in the store, without a gateway; then it serves `/ready` and chats.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from hypercore_agents.compute.base import ComputeBackend, SandboxRequest
from hypercore_agents.compute.testing import FaultBackend, MemoryBackend, MemoryHost
from hypercore_agents.manager.app import create_app
from hypercore_agents.manager.settings import ManagerSettings
from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.security.sealing import KeyRing, Sealer
from hypercore_agents.store import agents, enrolments
from hypercore_agents.store.database import Database
from hypercore_agents.store.keys import agent_owner
from hypercore_agents.store.schema import migrate
from support.asgi_server import serving
from support.waiting import until


@dataclass
class StandInAgent:
    """The server of one agent. Set its fields to make it misbehave."""

    agent_id: str
    bearer: str
    enrolled: bool = False
    ready: bool = True
    hangs: bool = False
    chats: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    keeps: set[str] = field(default_factory=set)
    headers: list[dict[str, str]] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)
    disconnected: int = 0
    files: int = 0
    answer: Callable[[web.Request, dict[str, Any]], Any] | None = None
    events: Callable[[web.Request], Any] | None = None
    file: Callable[[web.Request], Any] | None = None
    address: str = ""
    runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/agent/stats", self._stats)
        app.router.add_post("/v1/agent/chat", self._chat)
        app.router.add_delete("/v1/agent/session/{id}", self._delete)
        app.router.add_get("/v1/agent/session/{id}/files", self._file)
        app.router.add_get("/v1/agent/session/{id}/files/{path}", self._file)
        app.router.add_put("/v1/agent/session/{id}/files/{path}", self._file)
        app.router.add_delete("/v1/agent/session/{id}/files/{path}", self._file)
        app.router.add_get("/v1/agent/session/{id}/events/stream", self._events)
        app.router.add_post("/v1/agent/session/{id}/open", self._open)
        app.router.add_post("/v1/agent/session/{id}/release", self._release)
        app.router.add_post("/v1/agent/session/{id}/interrupt", self._interrupt)
        app.router.add_get("/v1/agent/session/{id}/approvals", self._approvals)
        app.router.add_post("/v1/agent/session/{id}/approvals/{approval}", self._no_approval)
        return app

    def _known(self, request: web.Request) -> None:
        if request.headers.get("authorization") != f"Bearer {self.bearer}":
            raise web.HTTPUnauthorized

    async def _ready(self, _: web.Request) -> web.Response:
        return web.json_response({}, status=200 if self.enrolled and self.ready else 503)

    async def _health(self, _: web.Request) -> web.Response:
        if self.hangs:
            await asyncio.Event().wait()
        return web.json_response({"status": "ok"})

    async def _metrics(self, request: web.Request) -> web.Response:
        self._known(request)
        placed = {chat["placement"]["session_id"] for chat in self.chats} - set(self.deleted)
        return web.Response(text=f"agent_active_sessions {len(placed)}\n")

    async def _stats(self, request: web.Request) -> web.Response:
        self._known(request)
        return web.json_response({"agent_id": self.agent_id})

    async def _file(self, request: web.Request) -> web.StreamResponse:
        self._known(request)
        self.files += 1
        if self.file is not None:
            given: web.StreamResponse = await self.file(request)
            return given
        session, path = request.match_info["id"], request.match_info.get("path")
        if request.method == "PUT":
            return web.json_response({"session_id": session, "path": path, "size": 2})
        if request.method == "DELETE":
            return web.json_response({"session_id": session, "path": path})
        if path is not None:
            return web.Response(body=b"{}", content_type="application/octet-stream")
        return web.json_response({"session_id": session, "count": 0, "files": [], "truncated": False})

    async def _delete(self, request: web.Request) -> web.Response:
        self._known(request)
        self.deleted.append(request.match_info["id"])
        return web.json_response({"session_id": request.match_info["id"], "deleted": True})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self._known(request)
        if self.events is not None:
            told: web.StreamResponse = await self.events(request)
            return told
        last = request.headers.get("last-event-id", "none")
        return web.Response(body=frame("delta", {"text": f"after {last}"}), content_type="text/event-stream")

    async def _open(self, request: web.Request) -> web.Response:
        self._known(request)
        self.opened.append(await request.json())
        return web.json_response({})

    async def _release(self, request: web.Request) -> web.Response:
        self._known(request)
        if request.match_info["id"] in self.keeps:
            return web.json_response({}, status=409)
        self.released.append(request.match_info["id"])
        return web.json_response({"session_id": request.match_info["id"], "deleted": True})

    async def _interrupt(self, request: web.Request) -> web.Response:
        self._known(request)
        self.interrupted.append(request.match_info["id"])
        return web.json_response({"session_id": request.match_info["id"], "interrupted": True})

    async def _approvals(self, request: web.Request) -> web.Response:
        self._known(request)
        return web.json_response({"session_id": request.match_info["id"], "count": 0, "approvals": []})

    async def _no_approval(self, request: web.Request) -> web.Response:
        self._known(request)
        error = {"type": "not_found", "message": "nothing waits", "request_id": "req_0", "retryable": False}
        return web.json_response({"error": error}, status=404)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self._known(request)
        body = await request.json()
        self.chats.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        if self.answer is not None:
            try:
                answer: web.StreamResponse = await self.answer(request, body)
            except asyncio.CancelledError:
                self.disconnected += 1
                raise
            return answer
        return web.json_response(completed(self, body))


def completed(agent: StandInAgent, body: dict[str, Any]) -> dict[str, Any]:
    """The result of a turn."""
    return {
        "session_id": body["placement"]["session_id"],
        "agent_id": agent.agent_id,
        "content": f"you said {body['prompt']}",
        "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2, "cost_usd": 0.0},
        "status": "completed",
        "turn": body["placement"]["turn"],
        "tools": False,
    }


def frame(name: str, data: Any) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class Agents:
    """Starts and stops stand-in agents. `enrols` False: they never enrol; `prepare` modifies each before it serves."""

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self.running: dict[str, StandInAgent] = {}
        self.refused_secrets = 0
        self.enrols = True
        self.prepare: Callable[[StandInAgent], None] = lambda _: None
        self._database = database
        self._sealer = sealer

    async def serve(self, request: SandboxRequest) -> str:
        """Start an agent. `MemoryBackend` calls this."""
        agent = StandInAgent(request.agent_id, new_bearer())
        self.prepare(agent)
        agent.runner = web.AppRunner(agent.application(), handler_cancellation=True, shutdown_timeout=0.5)
        await agent.runner.setup()
        site = web.TCPSite(agent.runner, "127.0.0.1", 0)
        await site.start()
        agent.address = f"http://127.0.0.1:{agent.runner.addresses[0][1]}"
        self.running[request.agent_id] = agent
        if self.enrols:
            await self._enrol(agent, request.enrolment_secret)
        return agent.address

    async def cease(self, agent_id: str) -> None:
        """Stop an agent."""
        agent = self.running.pop(agent_id, None)
        if agent is not None and agent.runner is not None:
            await agent.runner.cleanup()

    async def close(self) -> None:
        """Stop all agents."""
        for agent_id in list(self.running):
            await self.cease(agent_id)

    async def _enrol(self, agent: StandInAgent, secret: str) -> None:
        now = time.time()
        async with self._database.write() as connection:
            row = await enrolments.get_enrolment(connection, digest(secret))
            if row is None or row.agent_id != agent.agent_id or row.expires_at <= now:
                self.refused_secrets += 1
                return
            assert row.configuration is not None
            await enrolments.use_enrolment(connection, digest(secret), "key", now=now)
            sealed = self._sealer.seal(agent.bearer, agent_owner(agent.agent_id))
            agent.enrolled = await agents.set_bearer(connection, agent.agent_id, sealed, now=now)


@dataclass
class Deployment:
    """A served manager, its agents, backend and store. `urls` has one URL per worker."""

    url: str
    agents: Agents
    host: MemoryHost
    backend: FaultBackend
    database: Database
    http: aiohttp.ClientSession
    on_manager_gone: Callable[[], None] = lambda: None
    urls: list[str] = field(default_factory=list)
    calls: int = 0

    @property
    def agent(self) -> StandInAgent:
        """The only running agent."""
        (agent,) = self.agents.running.values()
        return agent

    async def call(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None, **params: str
    ) -> tuple[int, Any]:
        """Send a request, to the workers in turn; return its status and JSON."""
        self.calls += 1
        url = self.urls[self.calls % len(self.urls)] if len(self.urls) > 1 else self.url
        async with self.http.request(method, url + path, json=body, params=params, headers=headers) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    async def chat(self, prompt: str = "hello", **body: Any) -> tuple[int, Any]:
        """Send a chat to the pool as ada."""
        return await self.call("POST", "/v1/agent/chat", {"user_id": "ada", "prompt": prompt, **body})

    async def stats(self) -> dict[str, Any]:
        """Return the manager's statistics."""
        status, found = await self.call("GET", "/v1/agents/stats")
        assert status == 200, found
        assert isinstance(found, dict)
        return found

    async def warm(self, running: int) -> None:
        """Wait until that many agents of the pool run."""

        async def is_warm() -> bool:
            pool = (await self.stats())["pool"]
            return bool(pool["running"] == running and pool["starting"] == 0)

        await until(is_warm, seconds=20)


def settings_for(folder: Path, **values: Any) -> ManagerSettings:
    """Return settings for tests: state in a folder, no pool, short times."""
    chosen = {"min_agents": 0, "state_dir": folder, "start_timeout": 10, "stop_grace": 0.1, **values}
    return ManagerSettings(_env_file=None, **chosen)


@contextlib.asynccontextmanager
async def deployed(folder: Path, *, workers: int = 1, images: bool = False, **values: Any) -> AsyncIterator[Deployment]:
    """Serve a manager with a backend in memory, as one or several workers; stop everything at the end."""
    settings = settings_for(folder, **values)
    folder.mkdir(parents=True, exist_ok=True)
    sealer = Sealer(KeyRing.load_or_create(settings.key_path))
    database = Database(settings.store_url)
    await migrate(database)
    machine = Agents(database, sealer)
    host = MemoryHost()
    backend = FaultBackend(MemoryBackend(host, serve=machine.serve, stop_serving=machine.cease, images=images))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(database.close)
        stack.push_async_callback(machine.close)
        http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))
        deployment = Deployment("", machine, host, backend, database, http)
        stack.callback(lambda: deployment.on_manager_gone())
        deployment.urls = [await stack.enter_async_context(managing(settings, backend)) for _ in range(workers)]
        deployment.url = deployment.urls[0]
        await stack.enter_async_context(http)
        yield deployment


@contextlib.asynccontextmanager
async def managing(settings: ManagerSettings, backend: ComputeBackend) -> AsyncIterator[str]:
    """Serve one manager on loopback; yield its URL."""
    async with serving(create_app(settings, backend=backend, base_url="http://127.0.0.1:8080")) as url:
        yield url


@contextlib.asynccontextmanager
async def aiohttp_served(app: web.Application) -> AsyncIterator[str]:
    """Serve an aiohttp application on loopback; yield its URL."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
