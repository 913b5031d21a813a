"""The agent as a process of its own, as a compute backend starts it: descriptors in, environment out, signals."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio

from hypercore_agents.agent.isolation.processes import session_processes
from hypercore_agents.api.ids import new_agent_id
from hypercore_agents.http.serve import bind
from support.agent_server import StandInGateway, frames, secret_pipe, stand_in_gateway, tool, turn
from support.ports import free_port
from support.simulator_fixtures import RunningSimulator
from support.waiting import until

CANARY = "canary-8f2e61"
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
class Running:
    url: str
    process: asyncio.subprocess.Process
    state: Path
    client: aiohttp.ClientSession
    headers: dict[str, str]
    log: Path

    async def chat(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        async with self.client.post(f"{self.url}/v1/agent/chat", json=body, headers=self.headers) as answer:
            return answer.status, await answer.json()

    async def ready(self) -> int:
        try:
            async with self.client.get(f"{self.url}/ready") as answer:
                return answer.status
        except aiohttp.ClientError:
            return 0


@asynccontextmanager
async def agent_process(
    gateway: StandInGateway, tmp_path: Path, *, loop: str = "asyncio", secret: str | None = None, **environment: str
) -> AsyncIterator[Running]:
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
            yield Running(url, process, tmp_path / "agent", client, headers, log)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest_asyncio.fixture
async def gateway(simulator: RunningSimulator) -> AsyncIterator[StandInGateway]:
    async with stand_in_gateway(simulator.url) as running:
        yield running


async def ready(agent: Running) -> None:
    async with asyncio.timeout(60):
        while await agent.ready() != 200:
            assert agent.process.returncode is None, agent.log.read_text()
            await asyncio.sleep(0.01)


async def test_a_sessions_processes_see_no_secret_but_their_own(gateway: StandInGateway, tmp_path: Path) -> None:
    async with agent_process(gateway, tmp_path, loop="uvloop") as agent:
        await ready(agent)
        body = turn(tool("Bash", command="env; tr '\\0' '\\n' < /proc/$CLAUDE_PID/environ"), system_prompt=CANARY)
        status, answer = await agent.chat(body)
        assert status == 200, answer
        said = answer["content"]
        assert gateway.session_tokens[0] in said
        for secret in (gateway.secret, gateway.bearer, *gateway.agent_tokens, "upstream-key"):
            assert secret not in said
        names = {line.partition("=")[0] for line in said.splitlines() if "=" in line}
        assert not names & {"SOME_SECRET", "AGENT_ID", "GATEWAY_URL", "ENROLMENT_FD", "AGENT_STATE_DIR"}
        assert "ANTHROPIC_API_KEY" not in names
        for pid in session_processes(agent.state / "sessions" / body["session_id"]):
            assert CANARY not in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        agent.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(agent.process.wait(), 20) == 0
        log = agent.log.read_text()
        for secret in (CANARY, gateway.secret, gateway.bearer, *gateway.agent_tokens, *gateway.session_tokens):
            assert secret not in log


async def test_sigterm_lets_turns_end_refuses_new_ones_and_interrupts_the_rest(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    async with agent_process(gateway, tmp_path, DRAIN_GRACE="1.5", LOG_FORMAT="console") as agent:
        await ready(agent)
        short, long = turn("[[tokens 20]] [[rate 20]]", stream=True), turn("[[tokens 900]] [[rate 20]]", stream=True)
        endings: dict[str, tuple[str, dict[str, Any]]] = {}
        begun = {body["session_id"]: asyncio.Event() for body in (short, long)}

        async def follow(body: dict[str, Any]) -> None:
            async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
                async for frame in frames(answer):
                    if frame.event == "delta":
                        begun[body["session_id"]].set()
                    endings[body["session_id"]] = (frame.event, frame.data)

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for body in (short, long):
                group.create_task(follow(body))
            for each in begun.values():
                await each.wait()
            pids = session_processes(agent.state / "sessions")
            assert pids
            agent.process.send_signal(signal.SIGTERM)
            while await agent.ready() != 503:
                await asyncio.sleep(0.005)
            status, refused = await agent.chat(turn("too late"))
            assert (status, refused["error"]["type"]) == (503, "unavailable")
        assert endings[short["session_id"]][0] == "result"
        event, data = endings[long["session_id"]]
        assert (event, data["error"]["type"]) == ("error", "unavailable")
        assert await asyncio.wait_for(agent.process.wait(), 20) == 0
        assert not session_processes(agent.state / "sessions")
        assert "Traceback" not in agent.log.read_text()


async def test_a_refused_enrolment_ends_the_process_with_the_reason(gateway: StandInGateway, tmp_path: Path) -> None:
    async with agent_process(gateway, tmp_path, secret="x" * 43) as agent:
        assert await asyncio.wait_for(agent.process.wait(), 20) != 0
        assert "refused the enrolment secret" in agent.log.read_text()
        assert "x" * 43 not in agent.log.read_text()


async def test_before_enrolment_it_is_healthy_not_ready_and_closed(tmp_path: Path) -> None:
    nowhere = StandInGateway(url=f"http://127.0.0.1:{free_port()}")
    port = free_port()
    async with agent_process(nowhere, tmp_path, METRICS_PORT=str(port)) as agent:
        async with asyncio.timeout(20):
            while await agent.ready() != 503:
                await asyncio.sleep(0.01)
        async with agent.client.get(f"{agent.url}/health") as answer:
            assert (answer.status, (await answer.json())["state"]) == (200, "enrolling")
        async with agent.client.get(f"{agent.url}/v1/agent/stats", headers=agent.headers) as answer:
            assert (answer.status, (await answer.json())["error"]["type"]) == (503, "unavailable")
        async with agent.client.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert "agent_active_sessions 0.0" in await answer.text()
        agent.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(agent.process.wait(), 20) == 0


async def test_only_the_manager_is_answered_and_bad_input_names_its_field(
    gateway: StandInGateway, tmp_path: Path
) -> None:
    async with agent_process(gateway, tmp_path) as agent:
        await ready(agent)
        for path in ("/v1/agent/stats", "/metrics", "/v1/agent/session/x", "/nowhere"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {gateway.bearer}"}):
                async with agent.client.get(agent.url + path, headers=headers) as answer:
                    assert answer.status == 401
                    assert (await answer.json())["error"]["type"] == "unauthenticated"
        good = turn("hello")
        bad: list[tuple[Any, str]] = [
            ({**good, "surprise": 1}, "surprise"),
            ({**good, "prompt": ""}, "prompt"),
            ({key: value for key, value in good.items() if key != "placement"}, "placement"),
            ({**good, "placement": {**good["placement"], "generation": 0}}, "placement.generation"),
            (turn("x", allowed_tools=["--dangerously-skip-permissions"]), "placement.options.allowed_tools.0"),
        ]
        if os.geteuid() == 0:
            bad.append((turn("x", permission_mode="bypassPermissions"), "permission_mode"))
        for body, field in bad:
            status, error = await agent.chat(body)
            assert (status, error["error"]["type"]) == (400, "invalid_request")
            assert error["error"]["details"]["field"] == field
            assert field in error["error"]["message"]
        for raw in (b"{", b"\xff\xfe", b"", b"[]"):
            async with agent.client.post(f"{agent.url}/v1/agent/chat", data=raw, headers=agent.headers) as answer:
                assert (answer.status, json.loads(await answer.read())["error"]["type"]) == (400, "invalid_request")
        async with agent.client.get(f"{agent.url}/metrics", headers=agent.headers) as answer:
            text = await answer.text()
            assert 'agent_requests_total{endpoint="chat",status="client_error"}' in text
        await until(lambda: not session_processes(agent.state / "sessions"))
