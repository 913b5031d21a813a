"""The agent server as a process: inherited descriptors, its cleared environment, and signals."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

from hypercore_agents.agent.isolation.processes import session_processes
from support.agent_process import CANARY, AgentProcess, agent_process
from support.agent_server import StandInGateway, frames, tool, turn
from support.ports import free_port
from support.waiting import until


async def not_ready(agent: AgentProcess) -> bool:
    return await agent.ready_status() == 503


async def test_a_session_sees_only_its_own_secrets(gateway: StandInGateway, tmp_path: Path) -> None:
    async with agent_process(gateway, tmp_path, loop="uvloop") as agent:
        await agent.until_ready()
        body = turn(tool("Bash", command="env; tr '\\0' '\\n' < /proc/$CLAUDE_PID/environ"), system_prompt=CANARY)
        status, answer = await agent.chat(body)
        assert status == 200, answer
        output = answer["content"]
        assert gateway.session_tokens[0] in output
        for secret in (gateway.secret, gateway.bearer, *gateway.agent_tokens, "upstream-key"):
            assert secret not in output
        names = {line.partition("=")[0] for line in output.splitlines() if "=" in line}
        assert not names & {"SOME_SECRET", "AGENT_ID", "GATEWAY_URL", "ENROLMENT_FD", "AGENT_STATE_DIR"}
        assert "ANTHROPIC_API_KEY" not in names
        for pid in session_processes(agent.state / "sessions" / body["session_id"]):
            assert CANARY not in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        agent.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(agent.process.wait(), 20) == 0
        log = agent.log.read_text()
        for secret in (CANARY, gateway.secret, gateway.bearer, *gateway.agent_tokens, *gateway.session_tokens):
            assert secret not in log


async def test_sigterm_drains_the_agent(gateway: StandInGateway, tmp_path: Path) -> None:
    async with agent_process(gateway, tmp_path, DRAIN_GRACE="1.5", LOG_FORMAT="console") as agent:
        await agent.until_ready()
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
            await until(lambda: not_ready(agent))
            status, refused = await agent.chat(turn("too late"))
            assert (status, refused["error"]["type"]) == (503, "unavailable")
        assert endings[short["session_id"]][0] == "result"
        event, data = endings[long["session_id"]]
        assert (event, data["error"]["type"]) == ("error", "unavailable")
        assert await asyncio.wait_for(agent.process.wait(), 20) == 0
        assert not session_processes(agent.state / "sessions")
        assert "Traceback" not in agent.log.read_text()


async def test_a_refused_enrolment_ends_the_process(gateway: StandInGateway, tmp_path: Path) -> None:
    async with agent_process(gateway, tmp_path, secret="x" * 43) as agent:
        assert await asyncio.wait_for(agent.process.wait(), 20) != 0
        assert "refused the enrolment secret" in agent.log.read_text()
        assert "x" * 43 not in agent.log.read_text()


async def test_an_agent_is_healthy_but_not_ready_before_enrolment(tmp_path: Path) -> None:
    nowhere = StandInGateway(url=f"http://127.0.0.1:{free_port()}")
    port = free_port()
    async with agent_process(nowhere, tmp_path, METRICS_PORT=str(port)) as agent:
        await until(lambda: not_ready(agent))
        async with agent.client.get(f"{agent.url}/health") as answer:
            assert (answer.status, (await answer.json())["state"]) == (200, "enrolling")
        async with agent.client.get(f"{agent.url}/v1/agent/stats", headers=agent.headers) as answer:
            assert (answer.status, (await answer.json())["error"]["type"]) == (503, "unavailable")
        async with agent.client.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert "agent_active_sessions 0.0" in await answer.text()
        agent.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(agent.process.wait(), 20) == 0


async def test_invalid_bearers_and_bodies_are_rejected(gateway: StandInGateway, tmp_path: Path) -> None:
    async with agent_process(gateway, tmp_path) as agent:
        await agent.until_ready()
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
