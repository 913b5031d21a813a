"""The agent server in a process of its own, started as a compute backend starts it."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.http.serve import bind
from support.agent_server import StandInGateway, secret_pipe

CANARY = "canary-8f2e61"
"""Value of a variable that the agent inherits and must not pass on."""
START = """
import asyncio, sys
{loop}
from hypercore_agents.agent.server.app import run
from hypercore_agents.agent.settings import AgentSettings
runner(run(AgentSettings()))
"""
RUNNERS = {
    "asyncio": START.format(loop="runner = asyncio.run"),
    "uvloop": START.format(loop="import uvloop\nrunner = uvloop.run"),
}


@dataclass
class AgentProcess:
    """An agent server that runs as a child process, and a client for it."""

    url: str
    process: asyncio.subprocess.Process
    state: Path
    client: aiohttp.ClientSession
    headers: dict[str, str]
    log: Path

    async def chat(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Send a turn; return the status and the answer."""
        async with self.client.post(f"{self.url}/v1/agent/chat", json=body, headers=self.headers) as answer:
            return answer.status, await answer.json()

    async def ready_status(self) -> int:
        """Return the status of `/ready`, 0 while nothing answers."""
        try:
            async with self.client.get(f"{self.url}/ready") as answer:
                return answer.status
        except aiohttp.ClientError:
            return 0

    async def until_ready(self) -> None:
        """Wait until the agent takes turns. Fails with its log when it exits."""
        async with asyncio.timeout(60):
            while await self.ready_status() != 200:
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.01)


@asynccontextmanager
async def agent_process(
    gateway: StandInGateway, tmp_path: Path, *, loop: str = "asyncio", secret: str | None = None, **environment: str
) -> AsyncIterator[AgentProcess]:
    """Start an agent server process; kill it at the end if it still runs."""
    listener: socket.socket = bind("127.0.0.1", 0, "PORT")
    descriptor = secret_pipe(gateway.secret if secret is None else secret)
    log = tmp_path / "agent.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            RUNNERS[loop],
            stderr=errors,
            stdout=errors,
            pass_fds=(listener.fileno(), descriptor),
            env={
                "PATH": os.environ["PATH"],
                "AGENT_ID": new_agent_id(),
                "GATEWAY_URL": gateway.url,
                "AGENT_STATE_DIR": str(tmp_path / "agent"),
                "AGENT_LISTEN_FD": str(listener.fileno()),
                "ENROLMENT_FD": str(descriptor),
                "AGENT_MEMORY_MB": "2048",
                "SOME_SECRET": CANARY,
                **environment,
            },
        )
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    os.close(descriptor)
    async with aiohttp.ClientSession() as client:
        try:
            headers = {"authorization": f"Bearer {gateway.bearer}"}
            yield AgentProcess(url, process, tmp_path / "agent", client, headers, log)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
