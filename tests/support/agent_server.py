"""Agents for tests: served agent servers, and a stand-in gateway that issues grants and tokens.

The stand-in is a real HTTP server on loopback, with the real routes and the real sealing. It relays model requests to
the simulator. It has dictionaries instead of a store, and its tokens are not signed.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from hypercore_agents.agent.launcher.client import LauncherClient
from hypercore_agents.agent.server.app import create_app
from hypercore_agents.agent.server.server import AgentServer
from hypercore_agents.agent.settings import AgentSettings
from hypercore_agents.api.chat import Usage
from hypercore_agents.api.events import EventId, LoggedEvent, SessionEvents, parse_id, show_id
from hypercore_agents.api.ids import new_agent_id, new_session_id
from hypercore_agents.api.internal import (
    AgentConfiguration,
    AgentToken,
    EnrolmentGrant,
    EnrolRequest,
    EnrolResponse,
    EventEntry,
    EventMark,
    Heartbeat,
    HeartbeatTaken,
    SessionToken,
    SessionTokenRequest,
    Transcript,
    TranscriptAppend,
    TranscriptEntry,
    TranscriptTaken,
    WorkspaceStored,
)
from hypercore_agents.security.bearers import new_bearer
from hypercore_agents.security.enrolment import seal_grant
from support.asgi_server import serving
from support.waiting import until

DEADLINE_SECONDS = 30.0
MODEL = "claude-sonnet-4-5"
MCP_SERVER = """
import json, sys
TOOL = {"name": "remember", "description": "Keeps a word.",
        "inputSchema": {"type": "object", "properties": {"word": {"type": "string"}}}}
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    parameters = asked.get("params", {})
    result = {
        "initialize": lambda: {"protocolVersion": parameters["protocolVersion"], "capabilities": {"tools": {}},
                               "serverInfo": {"name": "notes", "version": "1"}},
        "tools/list": lambda: {"tools": [TOOL]},
        "tools/call": lambda: {"content": [{"type": "text", "text": "kept " + parameters["arguments"]["word"]}]},
    }.get(asked["method"], dict)()
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""


@dataclass
class StandInGateway:
    """Responds to an agent. Tests set its attributes and read the requests that it recorded."""

    upstream: str | None = None
    configuration: AgentConfiguration = field(
        default_factory=lambda: AgentConfiguration(max_concurrent=100, tools=True)
    )
    secret: str = field(default_factory=new_bearer)
    bearer: str = field(default_factory=new_bearer)
    agent_token_seconds: float = 3600
    session_token_seconds: float = 3600
    lost_enrolment_answers: int = 0
    stale: set[str] = field(default_factory=set)
    unplaced: set[str] = field(default_factory=set)
    usage_works: bool = True
    transcripts: dict[str, dict[str, TranscriptEntry]] = field(default_factory=dict)
    events: dict[str, list[EventEntry]] = field(default_factory=dict)
    workspaces: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    lost_workspaces: set[str] = field(default_factory=set)
    store_works: bool = True
    transcript_is_full: bool = False
    refuse_models: tuple[int, str] | None = None
    refuse_after: int = 0
    cuts_models: bool = False
    upstream_token: str = "upstream-key"
    url: str = ""
    enrolments: list[EnrolRequest] = field(default_factory=list)
    heartbeats: list[Heartbeat] = field(default_factory=list)
    agent_tokens: list[str] = field(default_factory=list)
    session_tokens: list[str] = field(default_factory=list)
    model_tokens: list[str] = field(default_factory=list)
    turn_output: dict[str, int] = field(default_factory=dict)

    async def enrol(self, request: web.Request) -> web.Response:
        asked = EnrolRequest.model_validate_json(await request.read())
        self.enrolments.append(asked)
        first = self.enrolments[0]
        if asked.secret != self.secret or asked.public_key != first.public_key:
            return _error(401, "unauthenticated")
        if len(self.enrolments) <= self.lost_enrolment_answers:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        token = self._agent_token()
        grant = EnrolmentGrant(
            agent_token=token.agent_token,
            expires_at=token.expires_at,
            bearer=self.bearer,
            configuration=self.configuration,
        )
        sealed = seal_grant(grant, asked.public_key, asked.agent_id)
        return _json(EnrolResponse(sealed=sealed))

    async def renew(self, request: web.Request) -> web.Response:
        if not self._is_agent(request):
            return _error(401, "unauthenticated")
        return _json(self._agent_token())

    async def heartbeat(self, request: web.Request) -> web.Response:
        if not self._is_agent(request):
            return _error(401, "unauthenticated")
        self.heartbeats.append(Heartbeat.model_validate_json(await request.read()))
        return _json(HeartbeatTaken(at=time.time()))

    async def session_token(self, request: web.Request) -> web.Response:
        if not self._is_agent(request):
            return _error(401, "unauthenticated")
        asked = SessionTokenRequest.model_validate_json(await request.read())
        if asked.session_id in self.stale:
            return _error(409, "conflict")
        if asked.session_id in self.unplaced:
            return _error(404, "not_found")
        logged = self.events.get(asked.session_id)
        mark = logged and EventMark(
            generation=logged[-1].generation, sequence=logged[-1].sequence, name=logged[-1].name
        )
        if mark and mark.name == "notice":
            mark.notice = json.loads(logged[-1].data)["text"] if logged else None
        token = f"session-{len(self.session_tokens)}-{new_bearer()}"
        self.session_tokens.append(token)
        return _json(
            SessionToken(session_token=token, expires_at=time.time() + self.session_token_seconds, last_event=mark)
        )

    async def append_transcript(self, request: web.Request) -> web.Response:
        if not self._is_agent(request):
            return _error(401, "unauthenticated")
        if not self.store_works:
            return _error(503, "unavailable")
        session_id = request.match_info["session"]
        body = TranscriptAppend.model_validate_json(await request.read())
        if session_id in self.stale:
            return _error(409, "conflict")
        if self.transcript_is_full:
            return _error(413, "payload_too_large")
        stored = self.transcripts.setdefault(session_id, {})
        for entry in body.entries:
            stored.setdefault(entry.uuid, entry)
        logged = self.events.setdefault(session_id, [])
        usage = self._usage_of(session_id) if body.turn is not None and self.usage_works else None
        if usage is not None and body.events and body.events[-1].name == "result":
            end = {**json.loads(body.events[-1].data), "usage": usage.model_dump(mode="json")}
            body.events[-1].data = json.dumps(end)
        logged += [e for e in body.events if not logged or order(e) > order(logged[-1])]
        return _json(TranscriptTaken(entries=len(body.entries), events=len(body.events), usage=usage))

    async def list_events(self, request: web.Request) -> web.Response:
        session_id = request.match_info["session"]
        last = parse_id(request.query.get("after")) or (0, 0)
        found = [event for event in self.events.get(session_id, []) if order(event) > last]
        shown = [
            LoggedEvent(id=show_id(order(event)), event=event.name, at="", data=json.loads(event.data))
            for event in found[: int(request.query["limit"])]
        ]
        more = shown[-1].id if len(shown) < len(found) else None
        return _json(SessionEvents(session_id=session_id, count=len(shown), events=shown, cut=False, next=more))

    async def transcript(self, request: web.Request) -> web.Response:
        session_id = request.match_info["session"]
        if not self.store_works:
            return _error(503, "unavailable")
        if session_id in self.stale:
            return _error(409, "conflict")
        if session_id in self.unplaced:
            return _error(404, "not_found")
        workspace = self.workspaces.get(session_id)
        entries = list(self.transcripts.get(session_id, {}).values())
        return _json(Transcript(entries=entries, workspace=workspace[0] if workspace else None))

    async def put_workspace(self, request: web.Request) -> web.Response:
        if not self.store_works:
            return _error(503, "unavailable")
        content = await request.read()
        digest = hashlib.sha256(content).hexdigest()
        self.workspaces[request.match_info["session"]] = (digest, content)
        return _json(WorkspaceStored(digest=digest, size=len(content)))

    async def get_workspace(self, request: web.Request) -> web.Response:
        if request.match_info["session"] in self.lost_workspaces:
            return _error(410, "internal")
        return web.Response(body=self.workspaces[request.match_info["session"]][1])

    async def usage(self, request: web.Request) -> web.Response:
        if not self.usage_works or not self._is_agent(request):
            return _error(503, "unavailable")
        return _json(self._usage_of(request.match_info["session_id"]))

    def _usage_of(self, session_id: str) -> Usage:
        tokens = self.turn_output.get(session_id, 0)
        return Usage(input_tokens=10, output_tokens=tokens, total_tokens=10 + tokens, cost_usd=0.25)

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """Relay to the simulator as bytes come; a client that disconnects cancels the upstream request."""
        self.model_tokens.append(request.headers.get("authorization", "").removeprefix("Bearer "))
        if self.cuts_models:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if self.refuse_models is not None and len(self.model_tokens) > self.refuse_after:
            status, message = self.refuse_models
            body = {"type": "error", "error": {"type": "budget_exceeded", "message": message}}
            return web.json_response(body, status=status)
        assert self.upstream is not None
        headers = {
            k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length", "accept-encoding")
        }
        headers["authorization"] = f"Bearer {self.upstream_token}"
        session_id = request.headers.get("x-claude-code-session-id", "")
        client: aiohttp.ClientSession = request.app[_CLIENT]
        async with client.post(self.upstream + request.path_qs, data=await request.read(), headers=headers) as answer:
            relayed = web.StreamResponse(
                status=answer.status,
                headers={k: v for k, v in answer.headers.items() if k.lower() in ("content-type", "retry-after")},
            )
            await relayed.prepare(request)
            try:
                async for chunk in answer.content.iter_any():
                    self.turn_output[session_id] = self.turn_output.get(session_id, 0) + chunk.count(
                        b"content_block_delta"
                    )
                    await relayed.write(chunk)
            except (aiohttp.ClientError, ConnectionError):
                if request.transport is not None:
                    request.transport.abort()
            return relayed

    def _agent_token(self) -> AgentToken:
        self.agent_tokens.append(f"agent-{new_bearer()}")
        return AgentToken(agent_token=self.agent_tokens[-1], expires_at=time.time() + self.agent_token_seconds)

    def _is_agent(self, request: web.Request) -> bool:
        return request.headers.get("authorization", "").removeprefix("Bearer ") in self.agent_tokens


def order(event: EventEntry) -> EventId:
    """Return the id of an event of a log."""
    return event.generation, event.sequence


_CLIENT = web.AppKey("client", aiohttp.ClientSession)


@contextlib.asynccontextmanager
async def stand_in_gateway(upstream: str | None = None, **knobs: Any) -> AsyncIterator[StandInGateway]:
    """Serve a stand-in gateway in this event loop."""
    gateway = StandInGateway(upstream, **knobs)
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/internal/enrol", gateway.enrol)
    app.router.add_post("/internal/agent-token", gateway.renew)
    app.router.add_post("/internal/heartbeat", gateway.heartbeat)
    app.router.add_post("/internal/session-tokens", gateway.session_token)
    app.router.add_get("/internal/sessions/{session_id}/turns/{turn}/usage", gateway.usage)
    app.router.add_post("/internal/sessions/{session}/transcript", gateway.append_transcript)
    app.router.add_get("/internal/sessions/{session}/transcript", gateway.transcript)
    app.router.add_get("/internal/sessions/{session}/events", gateway.list_events)
    app.router.add_put("/internal/sessions/{session}/workspace", gateway.put_workspace)
    app.router.add_get("/internal/sessions/{session}/workspaces/{digest}", gateway.get_workspace)
    app.router.add_post("/v1/messages", gateway.messages)
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        app[_CLIENT] = client
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield gateway
        finally:
            await runner.cleanup()


def secret_pipe(secret: str) -> int:
    """Return the descriptor of a pipe that contains the secret and nothing else."""
    reading, writing = os.pipe()
    os.write(writing, secret.encode())
    os.close(writing)
    return reading


def settings_for(gateway: StandInGateway, state: Path, **more: Any) -> AgentSettings:
    """Return the settings of an agent that enrols at this gateway."""
    values: dict[str, Any] = {
        "agent_id": new_agent_id(),
        "gateway_url": gateway.url,
        "agent_state_dir": state,
        "enrolment_fd": secret_pipe(gateway.secret),
        "agent_memory_mb": 2048,
        "interrupt_grace": 3.0,
        "spares": 0,
        **more,
    }
    return AgentSettings(**values)


@dataclass
class Agent:
    """A served agent, as its manager sees it."""

    url: str
    gateway: StandInGateway
    client: aiohttp.ClientSession
    server: AgentServer
    state: Path

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.client.post(self.url + path, json=body, headers=self.headers) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(self.url + path, headers=self.headers) as answer:
            return answer.status, await answer.json()

    async def delete(self, path: str) -> tuple[int, Any]:
        async with self.client.delete(self.url + path, headers=self.headers) as answer:
            return answer.status, await answer.json()

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Run a turn that must succeed."""
        status, answer = await self.post("/v1/agent/chat", body)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    async def stream(self, body: dict[str, Any]) -> list["Frame"]:
        """Run a streamed turn to completion."""
        async with self.client.post(self.url + "/v1/agent/chat", json=body, headers=self.headers) as answer:
            assert answer.status == 200, await answer.text()
            return [frame async for frame in frames(answer)]

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.gateway.bearer}"}

    def cli_pid(self, session_id: str) -> int:
        process = self.server.enrolled().get(session_id).process
        assert process is not None
        assert process.pid is not None
        return process.pid


_SENDS_ITS_CHANNEL = """
import os, socket
test = socket.socket(fileno=int(os.environ["AGENT_LISTEN_FD"]))
socket.send_fds(test, [b"c"], [int(os.environ["AGENT_LAUNCHER_FD"])])
os.close(int(os.environ["AGENT_LAUNCHER_FD"]))
test.recv(1)
"""


FIRST_USER = 2_110_000_000 + os.getpid() % 3_700 * 10_000
"""The first of the user ids for this test process's sessions; other test runs on this machine use others."""


@functools.cache
def exact_disks() -> bool:
    """Return whether the kernel counts sessions' files here. The probe runs in a child, since it changes its mounts."""
    command = [sys.executable, "-I", "-m", "hypercore_agents.agent.launcher", "--probe"]
    probed = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE_SECONDS).stdout)
    return str(probed["disk"]).startswith("exact")


@contextlib.contextmanager
def launched(
    state: Path, *options: str, users: int = 5_000, first: int = FIRST_USER, skills: Path | None = None
) -> Iterator[LauncherClient]:
    """Yield a client of a real launcher, whose server process passes its end of the connection to this process."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-m", "hypercore_agents.agent.launcher", "--uid", str(FIRST_USER + 9_999),
               "--session-uids", f"{first}-{first + users - 1}", "--state", str(state), *options,
               "--", "/usr/bin/env", "python3", "-c", _SENDS_ITS_CHANNEL]  # fmt: skip
    environment = {"PATH": "/usr/bin:/bin", "AGENT_LISTEN_FD": str(theirs.fileno())}
    if skills is not None:
        environment["SKILLS_DIR"] = str(skills)
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
    try:
        with ours, theirs:
            ours.settimeout(DEADLINE_SECONDS)
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
            client = LauncherClient(socket.socket(fileno=descriptors[0]))
            yield client
            client.close()
    finally:
        process.wait(DEADLINE_SECONDS)
        shutil.rmtree(state, ignore_errors=True)


@contextlib.asynccontextmanager
async def served_agent(
    gateway: StandInGateway, state: Path, launcher: LauncherClient | None = None, **settings: Any
) -> AsyncIterator[Agent]:
    """Serve an agent in this event loop, ready when yielded; it ends with all its processes afterwards."""
    server = AgentServer(settings_for(gateway, state, **settings), launcher)
    async with serving(create_app(server)) as url, aiohttp.ClientSession() as client:
        agent = Agent(url, gateway, client, server, state)
        await until(lambda: server.state != "enrolling")
        assert server.not_ready() is None
        yield agent


def turn(
    prompt: str,
    session_id: str | None = None,
    *,
    number: int = 1,
    timeout: float = 30,
    generation: int = 1,
    stream: bool = False,
    user_id: str = "ada",
    **options: Any,
) -> dict[str, Any]:
    """Return the body of a placed chat request."""
    session_id = session_id or new_session_id()
    return {
        "prompt": prompt,
        "user_id": user_id,
        "session_id": session_id,
        "stream": stream,
        "placement": {
            "session_id": session_id,
            "generation": generation,
            "turn": number,
            "timeout": timeout,
            "options": {"model": MODEL, **options},
        },
    }


@dataclass
class Frame:
    """One server-sent event."""

    event: str
    id: str
    data: dict[str, Any]


async def frames(answer: aiohttp.ClientResponse) -> AsyncIterator[Frame]:
    """Yield the events of a stream as they come, without comments."""
    fields: dict[str, str] = {}
    async for raw in answer.content:
        line = raw.decode().rstrip("\n")
        if not line and fields:
            yield Frame(fields["event"], fields.get("id", ""), json.loads(fields["data"]))
            fields = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


def another_agent(gateway: StandInGateway, state: Path, **settings: Any) -> AbstractAsyncContextManager[Agent]:
    gateway.enrolments.clear()
    return served_agent(gateway, state, **settings)


def stored_files(gateway: StandInGateway, session_id: str) -> set[str]:
    """Return the names of the workspace files in the stored archive."""
    with tarfile.open(fileobj=io.BytesIO(gateway.workspaces[session_id][1]), mode="r:gz") as archive:
        return {name.removeprefix("./") for name in archive.getnames() if name.startswith("./")}


def _json(model: Any) -> web.Response:
    return web.Response(body=model.model_dump_json(), content_type="application/json")


def _error(status: int, kind: str) -> web.Response:
    body = {"error": {"type": kind, "message": "no", "request_id": "req_x", "retryable": False}}
    return web.json_response(body, status=status)


def tool(name: str, **arguments: Any) -> str:
    """Return the directive that makes the simulator call a tool, for a prompt."""
    return f"[[tool {name} {json.dumps(arguments)}]]"


def some_uuid() -> str:
    """Return a session id that does not exist."""
    return str(uuid.uuid4())
