"""The warm-up of a standby server: runs it once, enrolled with a stand-in gateway on loopback, and ends it.

First-time work of a server is slow (late imports, pydantic models built on first use, routes that the framework builds
at the first request), most of all under TCG. Done before the snapshot, no clone repeats it: clones are ready a second
sooner and use less memory, since code that runs after the snapshot is translated again in each clone, and each page
that a clone writes becomes its own.
No state remains: the names, keys and tokens are made up here and valid nowhere, each run generates a new enrolment key,
and the process's random state is reseeded afterwards (`standby.reseed`).
"""

import asyncio
import contextlib
import functools
import io
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypercore_agents.agent.server.app import AgentApplication

_AGENT = "agent-0000000000000000"
_SECRET = "warm-up-" * 6
_BEARER = "warm-up"
_SECONDS = 120.0
_ROUNDS = 2


def _request(line: str, body: bytes = b"") -> bytes:
    head = f"{line} HTTP/1.1\r\nhost: warm-up\r\nauthorization: Bearer {_BEARER}\r\nconnection: close\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


_REQUESTS = (
    _request("GET /ready"),
    _request("GET /health"),
    _request("GET /v1/agent/stats"),
    _request("GET /v1/agent/session/warm-up"),
    _request("POST /v1/agent/chat", b"{}"),
)
"""The requests of a manager that need no model. The last two are refused."""


def warm_up(application: "AgentApplication") -> None:
    """Run the server once. Raises what the server raises: a server that fails here would also fail in a clone."""
    import uvloop

    environment = dict(os.environ)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            uvloop.run(_warm_up(application))
    except BaseException:
        sys.stderr.write(output.getvalue())  # the server's log, only after a failure
        raise
    finally:
        os.environ.clear()
        os.environ.update(environment)


async def _warm_up(application: "AgentApplication") -> None:
    heartbeat = asyncio.Event()
    gateway = await asyncio.start_server(functools.partial(_serve_gateway, heartbeat=heartbeat), "127.0.0.1", 0)
    port = gateway.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        reader, writer = os.pipe()
        os.write(writer, _SECRET.encode())
        os.close(writer)
        settings = {"agent_state_dir": folder, "gateway_url": f"http://127.0.0.1:{port}"}
        async with gateway, asyncio.timeout(_SECONDS):
            await _run(settings, reader, application, heartbeat)


async def _run(
    overrides: Mapping[str, str], secret: int, application: "AgentApplication", heartbeat: asyncio.Event
) -> None:
    from hypercore_agents.agent.server.app import run
    from hypercore_agents.agent.settings import AgentSettings

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    os.environ.clear()  # the launcher's socket is for the real run only
    settings = AgentSettings(
        agent_id=_AGENT,
        enrolment_fd=secret,
        agent_listen_fd=listener.detach(),
        log_level="INFO",
        drain_grace=0,
        **overrides,  # type: ignore[arg-type]  # pydantic takes strings for paths
    )
    serving = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        client = tasks.create_task(_send_requests_and_stop(port, serving, heartbeat))
        await run(settings, announce=serving.set, application=application)
        if not client.done():  # it would wait for a server that has ended
            raise RuntimeError("the server ended before the warm-up had sent all requests")


async def _send_requests_and_stop(port: int, serving: asyncio.Event, heartbeat: asyncio.Event) -> None:
    """Send a manager's requests, often enough for Python to specialize its bytecode, and then stop the server."""
    await serving.wait()
    await heartbeat.wait()
    for request in _REQUESTS * _ROUNDS:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await reader.read()
        writer.close()
    os.kill(os.getpid(), signal.SIGTERM)


async def _serve_gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heartbeat: asyncio.Event) -> None:
    """Act as the gateway: answer the first request of a connection, and close it."""
    from hypercore_agents.api.internal import AgentConfiguration, EnrolmentGrant, EnrolRequest, EnrolResponse
    from hypercore_agents.security.enrolment import seal_grant

    head = await reader.readuntil(b"\r\n\r\n")
    sizes = [int(line.partition(b":")[2]) for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    body = json.loads(await reader.readexactly(sizes[0] if sizes else 0) or b"{}")
    answer = b'{"at": 0}'
    if b"/internal/enrol " in head:
        request = EnrolRequest.model_validate(body)
        grant = EnrolmentGrant(
            agent_token=_BEARER,
            expires_at=time.time() + 3600,
            bearer=_BEARER,
            configuration=AgentConfiguration(max_concurrent=1, tools=False),
        )
        answer = (
            EnrolResponse(sealed=seal_grant(grant, request.public_key, request.agent_id)).model_dump_json().encode()
        )
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
    writer.write(b"content-length: %d\r\n\r\n%b" % (len(answer), answer))
    await writer.drain()
    writer.close()
    if b"/internal/heartbeat " in head:
        heartbeat.set()
