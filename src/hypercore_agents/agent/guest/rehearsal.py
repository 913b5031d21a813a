"""One life of an agent's server before it is anybody's: enrolled at a stand-in on loopback, served, ended.

What a server does for the first time is slow (late imports, models that pydantic builds when they are first used, the
framework's routes), most of all under TCG. Done before the snapshot, every clone is spared it: ready a second sooner.
Nothing of it stays: the names, keys and tokens are made up here and good for nothing, the key of enrolment is made anew
in every life, and what this process keeps of randomness is reseeded afterwards (`waiting.reseed`).
"""

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypercore_agents.agent.app import AgentApplication

_AGENT = "agent-0000000000000000"
_SECRET = "rehearsal" * 5
_SECONDS = 120.0


def rehearse(application: "AgentApplication") -> None:
    """Live once. Raises whatever a server's life raises: what cannot be rehearsed cannot be lived either."""
    import uvloop

    kept = dict(os.environ)
    try:
        uvloop.run(_rehearse(application))
    finally:
        os.environ.clear()
        os.environ.update(kept)


async def _rehearse(application: "AgentApplication") -> None:
    stand_in = await asyncio.start_server(_answer, "127.0.0.1", 0)
    port = stand_in.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        reader, writer = os.pipe()
        os.write(writer, _SECRET.encode())
        os.close(writer)
        life = _live({"agent_state_dir": folder, "gateway_url": f"http://127.0.0.1:{port}"}, reader, application)
        async with stand_in, asyncio.timeout(_SECONDS):
            await life


async def _live(own: Mapping[str, str], secret: int, application: "AgentApplication") -> None:
    from hypercore_agents.agent.app import run
    from hypercore_agents.agent.settings import AgentSettings

    os.environ.clear()  # the launcher's channel is for the one real life
    settings = AgentSettings(
        agent_id=_AGENT,
        enrolment_fd=secret,
        agent_host="127.0.0.1",
        agent_port=0,
        log_level="CRITICAL",
        drain_grace=0,
        **own,  # type: ignore[arg-type]  # pydantic takes strings for paths
    )
    await run(settings, announce=lambda: os.kill(os.getpid(), signal.SIGTERM), application=application)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Be the gateway: grant the first request of a connection, whatever it is, and close."""
    from hypercore_agents.api.internal import AgentConfiguration, EnrolmentGrant, EnrolRequest, EnrolResponse
    from hypercore_agents.security.enrolment import seal_grant

    head = await reader.readuntil(b"\r\n\r\n")
    sizes = [int(line.partition(b":")[2]) for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    body = json.loads(await reader.readexactly(sizes[0] if sizes else 0) or b"{}")
    answer = b"{}"
    if b"/internal/enrol " in head:
        asked = EnrolRequest.model_validate(body)
        grant = EnrolmentGrant(
            agent_token="rehearsal",  # noqa: S106 - good for nothing
            expires_at=time.time() + 3600,
            bearer="rehearsal",
            configuration=AgentConfiguration(max_concurrent=1, tools=False),
        )
        answer = EnrolResponse(sealed=seal_grant(grant, asked.public_key, asked.agent_id)).model_dump_json().encode()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
    writer.write(b"content-length: %d\r\n\r\n%b" % (len(answer), answer))
    await writer.drain()
    writer.close()
