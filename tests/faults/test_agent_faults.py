"""Faults during a turn, in the model, the CLI and its timing, with the real CLI and with misbehaving ones."""

import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from hypercore_agents.agent.isolation.processes import session_processes
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.api.ids import new_session_id
from support.agent_server import Agent, Frame, StandInGateway, frames, served_agent, tool, turn
from support.waiting import until


async def stream(agent: Agent, body: dict[str, Any]) -> list[Frame]:
    async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
        assert answer.status == 200
        return [frame async for frame in frames(answer)]


@pytest.mark.parametrize(
    ("fault", "status", "kind", "retryable"),
    [
        ("400", 502, "model_error", False),
        ("401", 502, "model_error", False),
        ("429", 429, "rate_limited", True),
        ("500", 502, "model_error", True),
        ("529", 502, "model_error", True),
        ("refuse", 502, "model_error", True),
    ],
)
async def test_api_errors_become_domain_errors(
    agent: Agent, fault: str, status: int, kind: str, retryable: bool
) -> None:
    body = turn(f"[[fault {fault}]]")
    got, answer = await agent.post("/v1/agent/chat", body)
    error = answer["error"]
    assert (got, error["type"], error["retryable"]) == (status, kind, retryable)
    if fault.isdigit():
        assert error["details"]["api_status"] == int(fault)
    if fault == "401":
        assert error["details"]["cause"] == "api_key"
        assert "key" in error["message"]
    assert "127.0.0.1" not in error["message"]
    assert (await agent.chat(turn("[[say on]]", body["session_id"], number=2)))["content"] == "on"


async def test_an_error_is_the_last_event_of_a_stream(agent: Agent) -> None:
    seen = await stream(agent, turn("[[fault 529]]", stream=True))
    assert [frame.event for frame in seen] == ["session", "error"]
    assert seen[-1].data["error"]["type"] == "model_error"
    assert seen[-1].data["error"]["request_id"].startswith("req_")


async def test_a_brief_overload_is_retried_silently(agent: Agent) -> None:
    assert (await agent.chat(turn("[[say fine]] [[fault 529 times=1]]")))["content"] == "fine"


async def test_a_cut_stream_is_reset_and_repeated(agent: Agent) -> None:
    seen = await stream(agent, turn("[[tokens 30]] [[rate 60]] [[fault cut times=1 after=12]]", stream=True))
    names = [frame.event for frame in seen]
    assert names.count("reset") == 1
    reset = names.index("reset")
    assert "delta" in names[:reset]
    after = "".join(frame.data["text"] for frame in seen[reset:] if frame.event == "delta")
    assert seen[-1].event == "result"
    assert after == seen[-1].data["content"]


async def test_a_spent_budget_is_an_error_and_max_tokens_a_status(agent: Agent, gateway: StandInGateway) -> None:
    gateway.refuse_models = (403, "the session's budget of 1 USD is spent")
    status, answer = await agent.post("/v1/agent/chat", turn("hello"))
    assert (status, answer["error"]["type"]) == (403, "budget_exceeded")
    assert answer["error"]["message"] == "the session's budget of 1 USD is spent"
    gateway.refuse_after, gateway.refuse_models = (
        len(gateway.model_tokens) + 1,
        (403, "max_tokens of the turn are used"),
    )
    cut = await agent.chat(turn("[[tokens 5]] [[stop max_tokens]]"))
    assert cut["status"] == "max_tokens"
    assert cut["content"]


async def test_the_deadline_applies_while_the_model_hangs(agent: Agent) -> None:
    session_id = new_session_id()
    await agent.chat(turn("hello", session_id))  # so that the CLI's start is not part of the timeout
    pid = agent.cli_pid(session_id)
    status, answer = await agent.post("/v1/agent/chat", turn("[[fault hang]]", session_id, number=2, timeout=1))
    assert (status, answer["error"]["type"]) == (504, "deadline_exceeded")
    assert (await agent.chat(turn("[[say on]]", session_id, number=3)))["content"] == "on"
    assert agent.cli_pid(session_id) == pid


async def test_the_deadline_applies_while_the_cli_hangs(agent: Agent) -> None:
    body = turn("the first word is dolomite", timeout=20)
    await agent.chat(body)
    pid = agent.cli_pid(body["session_id"])
    os.kill(pid, signal.SIGSTOP)
    status, answer = await agent.post("/v1/agent/chat", turn("hello", body["session_id"], number=2, timeout=1))
    assert (status, answer["error"]["type"]) == (504, "deadline_exceeded")
    assert not os.path.exists(f"/proc/{pid}")
    resumed = await agent.chat(turn("[[recall 1]]", body["session_id"], number=3, timeout=20))
    assert "dolomite" in resumed["content"]


async def test_a_slow_client_does_not_delay_the_deadline(agent: Agent) -> None:
    body = turn("[[tokens 400000]]", timeout=3, stream=True)
    async with agent.client.post(
        f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers, read_bufsize=1024
    ) as answer:
        await until(lambda: agent.server.enrolled().get(body["session_id"]).turn is None, seconds=10)
        answer.close()


async def test_a_session_resumes_after_its_cli_was_killed_in_a_turn(agent: Agent) -> None:
    body = turn("[[tokens 500]] [[rate 20]] the first word is epidote", stream=True)
    seen = []
    async with agent.client.post(f"{agent.url}/v1/agent/chat", json=body, headers=agent.headers) as answer:
        async for frame in frames(answer):
            seen.append(frame)
            if frame.event == "delta" and len(seen) == 4:
                os.kill(agent.cli_pid(body["session_id"]), signal.SIGKILL)
    assert seen[-1].event == "error"
    assert seen[-1].data["error"]["type"] == "agent_unreachable"
    assert "continues with its next turn" in seen[-1].data["error"]["message"]
    resumed = await agent.chat(turn("[[recall 1]]", body["session_id"], number=2))
    assert "epidote" in resumed["content"]


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


_ANSWERS_INITIALIZE = """
import json, sys, time
request = json.loads(sys.stdin.readline())
print(json.dumps({"type": "control_response", "response": {
    "subtype": "success", "request_id": request["request_id"], "response": {}}}), flush=True)
"""


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("exits during its start", "import sys\nprint('no', file=sys.stderr)\nsys.exit(3)", "agent_unreachable"),
        ("never answers", "import time\ntime.sleep(600)", "agent_unreachable"),
        (
            "prints garbage during its start",
            "print('{garbage', flush=True)\nimport time\ntime.sleep(600)",
            "agent_unreachable",
        ),
        (
            "prints garbage during a turn",
            _ANSWERS_INITIALIZE + 'sys.stdin.readline()\nprint(\'{"type": "user"}\', flush=True)\ntime.sleep(600)',
            "agent_unreachable",
        ),
        (
            "prints an endless line",
            _ANSWERS_INITIALIZE + "sys.stdin.readline()\nwhile True: sys.stdout.write('{' * 65536)",
            "agent_unreachable",
        ),
        ("exits during a turn", _ANSWERS_INITIALIZE + "sys.stdin.readline()", "agent_unreachable"),
        ("hangs during a turn", _ANSWERS_INITIALIZE + "time.sleep(600)", "deadline_exceeded"),
    ],
)
async def test_a_misbehaving_cli_leaves_no_processes(
    gateway: StandInGateway, tmp_path: Path, name: str, text: str, kind: str
) -> None:
    cli = script(tmp_path / "claude", text)
    async with served_agent(
        gateway, tmp_path / "agent", claude_cli_path=cli, cli_start_timeout=1, interrupt_grace=0.5
    ) as agent:
        body = turn("hello", timeout=2, stream=True)
        seen = await stream(agent, body)
        assert seen[-1].data["error"]["type"] == kind, name
        assert not session_processes(SessionFolder.of(agent.state, body["session_id"]).root)
        assert agent.server.enrolled().capacity.used == 0
        metrics = agent.server.render_metrics().decode()
        assert f'agent_errors_total{{error_type="{kind}"}} 1.0' in metrics
        assert 'agent_requests_total{endpoint="chat",status="server_error"} 1.0' in metrics


async def test_a_resume_ends_daemons_of_the_dead_cli(agent: Agent) -> None:
    body = turn(tool("Bash", command="(setsid sleep 300 >/dev/null 2>&1 &) ; echo ok"))
    await agent.chat(body)
    folder = SessionFolder.of(agent.state, body["session_id"]).root
    os.kill(agent.cli_pid(body["session_id"]), signal.SIGKILL)
    await until(lambda: not agent.server.enrolled().get(body["session_id"]).process.alive)  # type: ignore[union-attr]
    daemons = session_processes(folder)
    assert daemons
    await agent.chat(turn("hello again", body["session_id"], number=2))
    assert not daemons & session_processes(folder)
