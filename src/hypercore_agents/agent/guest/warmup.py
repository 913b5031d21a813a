"""One life of an agent's server before it is anybody's: enrolled at a stand-in on loopback, served, ended.

What a server does for the first time is slow (late imports, models that pydantic builds when they are first used, the
framework's routes, which it builds at the first request), most of all under TCG. Done before the snapshot, every clone
is spared it: ready a second sooner. It is spared the memory too: what runs after the snapshot is translated for each
clone anew, and every page that it writes to is one of its own from then on.
Nothing of it stays: the names, keys and tokens are made up here and good for nothing, the key of enrolment is made anew
in every life, and what this process keeps of randomness is reseeded afterwards (`waiting.reseed`).
"""

import asyncio
import contextlib
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
_SECRET = "rehearsal" * 5
_BEARER = "rehearsal"
_SECONDS = 120.0
_ROUNDS = 2


def _request(line: str, body: bytes = b"") -> bytes:
    head = f"{line} HTTP/1.1\r\nhost: rehearsal\r\nauthorization: Bearer {_BEARER}\r\nconnection: close\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


_REQUESTS = (
    _request("GET /ready"),
    _request("GET /health"),
    _request("GET /v1/agent/stats"),
    _request("GET /v1/agent/session/rehearsal"),
    _request("POST /v1/agent/chat", b"{}"),
)
"""What a manager asks, as far as it can be answered without a model. The last two are refused."""


def rehearse(application: "AgentApplication") -> None:
    """Live once. Raises whatever a server's life raises: what cannot be rehearsed cannot be lived either."""
    import uvloop

    kept = dict(os.environ)
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            uvloop.run(_rehearse(application))
    except BaseException:
        sys.stderr.write(words.getvalue())  # what it said of its end; of a life that went well nobody wants to hear
        raise
    finally:
        os.environ.clear()
        os.environ.update(kept)


async def _rehearse(application: "AgentApplication") -> None:
    beaten = asyncio.Event()
    stand_in = await asyncio.start_server(lambda reader, writer: _answer(reader, writer, beaten), "127.0.0.1", 0)
    port = stand_in.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        reader, writer = os.pipe()
        os.write(writer, _SECRET.encode())
        os.close(writer)
        own = {"agent_state_dir": folder, "gateway_url": f"http://127.0.0.1:{port}"}
        async with stand_in, asyncio.timeout(_SECONDS):
            await _live(own, reader, application, beaten)


async def _live(own: Mapping[str, str], secret: int, application: "AgentApplication", beaten: asyncio.Event) -> None:
    from hypercore_agents.agent.server.app import run
    from hypercore_agents.agent.settings import AgentSettings

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    os.environ.clear()  # the launcher's channel is for the one real life
    settings = AgentSettings(
        agent_id=_AGENT,
        enrolment_fd=secret,
        agent_listen_fd=listener.detach(),
        log_level="INFO",
        drain_grace=0,
        **own,  # type: ignore[arg-type]  # pydantic takes strings for paths
    )
    serving = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        asker = tasks.create_task(_ask_and_end(port, serving, beaten))
        await run(settings, announce=serving.set, application=application)
        if not asker.done():  # it would wait for a server that is gone
            raise RuntimeError("the server ended before it had been asked everything")


async def _ask_and_end(port: int, serving: asyncio.Event, beaten: asyncio.Event) -> None:
    """Ask what a manager asks, as often as it takes Python to settle how it runs the code; then end the server."""
    await serving.wait()
    await beaten.wait()
    for request in _REQUESTS * _ROUNDS:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await reader.read()
        writer.close()
    os.kill(os.getpid(), signal.SIGTERM)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, beaten: asyncio.Event) -> None:
    """Be the gateway: answer the first request of a connection, and close."""
    from hypercore_agents.api.internal import AgentConfiguration, EnrolmentGrant, EnrolRequest, EnrolResponse
    from hypercore_agents.security.enrolment import seal_grant

    head = await reader.readuntil(b"\r\n\r\n")
    sizes = [int(line.partition(b":")[2]) for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    body = json.loads(await reader.readexactly(sizes[0] if sizes else 0) or b"{}")
    answer = b'{"at": 0}'
    if b"/internal/enrol " in head:
        asked = EnrolRequest.model_validate(body)
        grant = EnrolmentGrant(
            agent_token=_BEARER,
            expires_at=time.time() + 3600,
            bearer=_BEARER,
            configuration=AgentConfiguration(max_concurrent=1, tools=False),
        )
        answer = EnrolResponse(sealed=seal_grant(grant, asked.public_key, asked.agent_id)).model_dump_json().encode()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
    writer.write(b"content-length: %d\r\n\r\n%b" % (len(answer), answer))
    await writer.drain()
    writer.close()
    if b"/internal/heartbeat " in head:
        beaten.set()
