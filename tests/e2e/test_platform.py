"""The platform as a newcomer uses it: the deploy script's demo, chats with the real CLI, and the end of the demo.

One deployment serves the whole module, because a start takes seconds; the last tests stop it and check for leftovers.
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from hypercore_agents.api.chat import ChatResponse
from hypercore_agents.client import AsyncClient, Client, Event, Retrying, ServerError
from support.agent_server import tool
from support.cutting_proxy import cutting_proxy
from support.folders_in_use import content_of, files_below
from support.ports import free_port

ROOT = Path(__file__).parents[2]
CANARY = "sk-ant-canary-9f2c41d07be84a55"
QUICK = Retrying(attempts=8, first=0.05, longest=1.0)
pytestmark = [pytest.mark.timeout(300)]


@dataclass
class Deployment:
    state: Path
    ports: tuple[int, int, int, int]
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def simulator(self) -> str:
        return f"http://127.0.0.1:{self.ports[2]}"

    def script(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ROOT / "scripts/deploy-claude-agents.sh"), *arguments],
            env=self.environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    def processes(self) -> list[str]:
        """Return command lines of the processes with this deployment's state folder in environment or arguments."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.state).encode() in text and int(entry.name) != os.getpid():
                found.append(f"{entry.name} {command}")
        return found

    def listening(self) -> list[int]:
        """The deployment's ports on which a process still listens."""
        busy = []
        for port in self.ports:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    busy.append(port)
        return busy


def roles(deployment: Deployment) -> set[str]:
    """Return the platform's own processes, without agents and CLIs."""
    names = ("up", "manager", "gateway", "autoscaler", "simulator")
    return {line for line in deployment.processes() if any(f" -m hypercore_agents {name} " in line for name in names)}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    state = tmp_path_factory.mktemp("deployment") / "state"
    skills = tmp_path_factory.mktemp("skills")
    (skills / "greeting").mkdir()
    (skills / "greeting" / "SKILL.md").write_text("---\nname: greeting\ndescription: Greets people.\n---\nSay ahoy.\n")
    for path in (skills, *skills.rglob("*")):
        path.chmod(0o755)
    ports = (free_port(), free_port(), free_port(), free_port())
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "PYTHONPATH") or k.startswith("COV")}
    environment = kept | {
        "STATE_DIR": str(state),
        "LISTEN_ADDR": f"127.0.0.1:{ports[0]}",
        "GATEWAY_ADDR": f"127.0.0.1:{ports[1]}",
        "SIMULATOR_LISTEN": f"127.0.0.1:{ports[2]}",
        "AUTOSCALER_ADDR": f"127.0.0.1:{ports[3]}",
        "HYPERCORE_VENV": str(Path(sys.executable).parents[1]),
        "MIN_AGENTS": "2",
        "COMPUTE_BACKEND": "process",
        "AGENT_HOST": "127.0.0.1",  # has no effect yet
        "SKILLS_DIR": str(skills),
        "POOL_CONFIG": json.dumps({"skills": ["greeting"], "disallowed_tools": ["NotebookEdit"], "effort": "low"}),
        **({} if os.geteuid() == 0 else {"ALLOW_UNISOLATED_TOOLS": "1"}),
    }
    deployment = Deployment(state, ports, environment)
    started = deployment.script("--demo")
    assert started.returncode == 0, started.stdout + started.stderr
    assert "curl" in started.stderr
    yield deployment
    deployment.script("--stop", "--purge")
    shutil.rmtree(state, ignore_errors=True)


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as client:
        yield client


async def chat(http: aiohttp.ClientSession, url: str, prompt: str, **body: Any) -> dict[str, Any]:
    async with http.post(f"{url}/v1/agent/chat", json={"user_id": "ada", "prompt": prompt, **body}) as answer:
        result = await answer.json()
        assert answer.status == 200, result
        assert isinstance(result, dict)
        return result


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    name = ""
    async for line in answer.content:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield name, json.loads(text.removeprefix("data: "))


async def test_health_lists_every_dependency(deployment: Deployment, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{deployment.url}/health") as answer:
        assert answer.status == 200
        health = await answer.json()
    assert {"store", "gateway", "backend"} <= set(health["dependencies"])
    for page in ("/ready", "/metrics", "/docs", "/openapi.json"):
        async with http.get(f"{deployment.url}{page}") as answer:
            assert answer.status == 200, page
    async with http.get(f"{deployment.url}/docs") as answer:
        assert "https://" not in await answer.text()


def test_variables_without_effect_are_logged_as_warnings(deployment: Deployment) -> None:
    logs = b"".join(content_of(path) for path in files_below(deployment.state) if path.suffix == ".log").decode()
    assert "AGENT_HOST is not enforced" in logs


async def test_running_the_script_twice_is_harmless(deployment: Deployment) -> None:
    before = roles(deployment)
    again = await asyncio.to_thread(deployment.script, "--demo")
    assert again.returncode == 0
    assert "already running" in again.stderr
    assert roles(deployment) == before


async def test_the_second_turn_of_a_session_sees_the_first(deployment: Deployment, http: aiohttp.ClientSession) -> None:
    first = await chat(http, deployment.url, "Remember the word heliotrope, please.")
    second = await chat(http, deployment.url, "[[recall 1]]", session_id=first["session_id"])
    assert "heliotrope" in second["content"]
    assert (first["turn"], second["turn"]) == (1, 2)
    assert second["usage"]["input_tokens"] > 0
    assert second["usage"]["output_tokens"] > 0
    assert second["usage"]["cost_usd"] > 0
    async with http.get(f"{deployment.simulator}/simulator/requests") as answer:
        recorded = json.dumps(await answer.json())
    assert recorded.count("heliotrope") >= 2, "the second request did not carry the first turn"
    async with http.get(f"{deployment.url}/v1/usage", params={"user_id": "ada"}) as answer:
        usage = await answer.json()
    assert usage["total"]["total_tokens"] >= first["usage"]["total_tokens"] + second["usage"]["total_tokens"]


@pytest.mark.parametrize("face", ["synchronous", "asynchronous"])
async def test_client_streams_survive_cut_connections_without_loss(deployment: Deployment, face: str) -> None:
    prompt = "[[tokens 150]] [[rate 100]] [[say once upon a time]]"
    async with cutting_proxy(deployment.ports[0], 900, 2_000, 350) as proxy:
        if face == "synchronous":

            def read() -> tuple[list[Event], ChatResponse]:
                with Client(proxy.url, retrying=QUICK).stream(prompt, user_id="ada") as stream:
                    return [*stream], stream.result

            received, result = await asyncio.to_thread(read)
        else:
            async with AsyncClient(proxy.url, retrying=QUICK) as client, client.stream(prompt, user_id="ada") as stream:
                received, result = [event async for event in stream], await stream.result()
    assert result.status == "completed"
    assert len(result.content) > 150
    assert "".join(event.text for event in received) == result.content
    ids = [tuple(map(int, event.id.split("."))) for event in received if event.id]
    assert ids == [(ids[0][0], ids[0][1] + number) for number in range(len(received))]
    first, *again = proxy.requests
    assert first.startswith(b"POST /v1/agent/chat")
    assert len(again) >= 3
    assert all(b"\r\nlast-event-id: " in request.lower() for request in again)


async def model_request(deployment: Deployment, http: aiohttp.ClientSession, prompt: str) -> dict[str, Any]:
    """Return the body of the newest model request whose conversation contains this prompt."""
    async with http.get(f"{deployment.simulator}/simulator/requests") as answer:
        recorded = (await answer.json())["requests"]
    bodies = [request["body"] for request in recorded if request["path"] == "/v1/messages"]
    found: dict[str, Any] = [body for body in bodies if prompt in json.dumps(body["messages"])][-1]
    return found


def test_a_turn_that_fails_after_a_tool_call_runs_only_once(deployment: Deployment) -> None:
    prompt = tool("Bash", command="echo ran >> count.txt") + "[[fault 529 times=4]] [[say ok]]"
    client = Client(deployment.url, retrying=QUICK)
    with pytest.raises(ServerError) as caught:
        client.chat(prompt, user_id="ada")
    error = caught.value
    assert (error.type, error.retryable, error.details["acted"]) == ("model_error", False, True)
    session_id = error.details["session_id"]
    assert client.read_file(session_id, "count.txt") == b"ran\n"
    history = client.session(session_id).history
    assert [message.text for message in history if message.text == prompt] == [prompt]
    assert client.chat("[[say on]]", user_id="ada", session_id=session_id).content == "on"


async def test_sdk_options_of_pool_config_and_first_turn_reach_the_model(
    deployment: Deployment, http: aiohttp.ClientSession
) -> None:
    """The third way, the body of a spawn, is part of the test of a dedicated agent below."""
    result = await chat(
        http, deployment.url, 'options one [[tool Skill {"skill": "greeting"}]]', model="claude-opus-4-6"
    )
    assert result["tools"], result
    body = await model_request(deployment, http, "options one")
    offered = {tool["name"] for tool in body["tools"]}
    assert "Skill" in offered
    assert "NotebookEdit" not in offered
    assert body["output_config"]["effort"] == "low"
    assert "Say ahoy." in json.dumps(body["messages"])
    said = {"model": "claude-opus-4-6", "effort": "high", "disallowed_tools": ["Grep"], "skills": []}
    await chat(http, deployment.url, "options two", **said)
    body = await model_request(deployment, http, "options two")
    offered = {tool["name"] for tool in body["tools"]}
    assert "NotebookEdit" in offered
    assert not offered & {"Grep", "Skill"}
    assert body["output_config"]["effort"] == "high"


async def test_streamed_turns_arrive_during_generation(deployment: Deployment, http: aiohttp.ClientSession) -> None:
    body = {"user_id": "ada", "prompt": "[[ttft 0.05]] [[rate 40]] [[tokens 80]]", "stream": True}
    async with http.post(f"{deployment.url}/v1/agent/chat", json=body) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        times: dict[str, float] = {}
        text = ""
        result: dict[str, Any] = {}
        async for name, data in events(answer):
            times.setdefault(name, time.monotonic())
            if name == "delta":
                text += data["text"]
            if name == "result":
                result = data
    assert next(iter(times)) == "session"
    assert result["status"] == "completed"
    assert text == result["content"]
    assert times["result"] - times["delta"] > 1.0, "80 tokens at 40/s take two seconds: the deltas arrived too late"


async def test_a_dedicated_agent_runs_a_tool_and_is_deleted(
    deployment: Deployment, http: aiohttp.ClientSession
) -> None:
    spawn = {"user_id": "bob", "anthropic_api_key": CANARY, "memory": 1024, "cores": 1, "tags": {"team": "blue"}}
    thinking = {"type": "enabled", "budget_tokens": 2000}
    spawn |= {"system_prompt": "You are Bob's.", "model": "claude-sonnet-4-5", "thinking": thinking}
    async with http.post(f"{deployment.url}/v1/agents/spawn", json=spawn) as answer:
        agent = await answer.json()
        assert answer.status == 200, agent
    assert (agent["status"], agent["user_id"], agent["cores"], agent["memory"]) == ("running", "bob", 1, 1024)
    async with http.get(f"{deployment.url}/v1/agents/list", params={"user_id": "bob"}) as answer:
        listed = await answer.json()
    assert [entry["agent_id"] for entry in listed["agents"]] == [agent["agent_id"]]

    tool = 'Write {"file_path": "note.txt", "content": "written by a tool"}'
    result = await chat(http, agent["url"], f"[[tool {tool}]]", user_id="bob", tools=["Write", "Read", "Bash"])
    shown = await chat(
        http, agent["url"], '[[tool Bash {"command": "cat note.txt"}]]', user_id="bob", session_id=result["session_id"]
    )
    assert "written by a tool" in shown["content"]
    asked = await model_request(deployment, http, "note.txt")
    assert "You are Bob's." in json.dumps(asked["system"])
    assert (asked["model"], asked["thinking"]["budget_tokens"]) == ("claude-sonnet-4-5", 2000)
    path = f"{agent['url']}/v1/agent/session/{result['session_id']}"
    async with http.get(path, params={"user_id": "bob"}) as answer:
        history = (await answer.json())["history"]
    prompts = [message["text"] for message in history if message["role"] == "user" and message["text"]]
    assert [prompt.partition(" ")[0] for prompt in prompts] == ["[[tool", "[[tool"], history
    assert [call["name"] for message in history for call in message["tool_uses"]] == ["Write", "Bash"]
    outcomes = [outcome for message in history for outcome in message["tool_results"]]
    assert (len(outcomes), outcomes[1]["text"]) == (2, "written by a tool")
    answers = [message["text"] for message in history if message["role"] == "assistant" and message["text"]]
    assert answers[-1] == shown["content"]
    assert result["content"] in answers
    files = [path for path in files_below(deployment.state) if path.name == "note.txt"]
    # No files if the session has its own file system, which only the launcher has mounted.
    assert all(result["session_id"] in str(path) for path in files)

    spoken = json.dumps([agent, listed, result, shown])
    assert CANARY not in spoken
    assert await _leaks(deployment, http, agent["agent_id"]) == []

    params = {"agent_id": agent["agent_id"]}
    async with http.delete(f"{deployment.url}/v1/agents/delete", params=params) as answer:
        assert answer.status == 200, await answer.text()
    async with http.get(f"{deployment.url}/v1/agents/get", params=params) as answer:
        assert (await answer.json()).get("status", "gone") in ("stopped", "gone")
    assert not [line for line in deployment.processes() if agent["agent_id"] in line]
    assert not [path for path in files_below(deployment.state) if path.name == "note.txt"]


@pytest.mark.root
async def test_model_requests_by_a_tool_have_the_limits_of_its_session(
    deployment: Deployment, http: aiohttp.ClientSession
) -> None:
    ask = {"model": "claude-opus-4-1", "max_tokens": 50, "messages": [{"role": "user", "content": "reached"}]}
    session = {"model": "claude-sonnet-4-5", "max_tokens": 2000}
    asks = [
        ask | {"model": session["model"]},  # the positive control
        ask,
        ask | {"model": session["model"], "tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        ask | {"model": session["model"], "mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]},
    ]
    call = "curl -s -m 9 -o /dev/null -w '%{http_code} ' -H 'content-type: application/json' "
    call += "-H 'anthropic-version: 2023-06-01' http://127.0.0.1:8090/v1/messages -d "
    script = "; ".join(f"{call} '{json.dumps(asked)}'" for asked in asks)
    script += "; curl -s -m 9 -o /dev/null -w '%{http_code} ' http://127.0.0.1:8090/internal/heartbeat -d '{}'"
    script += f"; curl -s -m 9 -o /dev/null -w '%{{http_code}} ' {deployment.url}/v1/agents/stats; true"
    prompt = f"[[tool Bash {json.dumps({'command': script})}]]"
    said = (await chat(http, deployment.url, prompt, **session))["content"]
    codes = [int(word) for word in said.partition('answered: "')[2].split()[:6]]
    assert codes[0] == 200, said
    assert all(400 <= code < 500 for code in codes[1:5]), said
    assert codes[5] == 0, said


async def _leaks(deployment: Deployment, http: aiohttp.ClientSession, agent_id: str) -> list[str]:
    """Return places that contain the canary key: files, database, logs, environments, arguments, metrics, errors."""
    needle = CANARY.encode()
    found = [str(path) for path in files_below(deployment.state) if needle in content_of(path)]
    for line in deployment.processes():
        for part in ("environ", "cmdline"):
            try:
                if needle in Path(f"/proc/{line.split()[0]}/{part}").read_bytes():
                    found.append(f"{part} of {line}")
            except OSError:
                continue
    bad_spawn = {"user_id": "bob", "anthropic_api_key": CANARY, "cores": "many"}
    for method, path, body in (
        ("GET", "/metrics", None),
        ("GET", f"/agents/{agent_id}/metrics", None),
        ("GET", f"/v1/agents/get?agent_id={agent_id}", None),
        ("POST", "/v1/agents/spawn", bad_spawn),
        ("POST", "/v1/agents/spawn", {"user_id": "bob", "anthropic_api_key": f"{CANARY} with spaces"}),
    ):
        async with http.request(method, f"{deployment.url}{path}", json=body) as answer:
            if CANARY in await answer.text():
                found.append(f"{method} {path}")
    return found


def _snapshot(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/v1/agents/stats", timeout=10) as answer:
        stats = json.loads(answer.read())
        assert isinstance(stats, dict)
        return stats


def test_every_agent_reports_its_utilisation(deployment: Deployment) -> None:
    deadline = time.monotonic() + 60
    while (pool := _snapshot(deployment.url)["pool"])["reporting"] < 2:
        assert time.monotonic() < deadline, pool
        time.sleep(0.2)
    assert 0 < pool["memory"] < 1


def test_stop_leaves_nothing_behind(deployment: Deployment) -> None:
    assert _snapshot(deployment.url)["pool"]["running"] == 2
    assert len(deployment.processes()) >= 5
    stopped = deployment.script("--stop")
    assert stopped.returncode == 0, stopped.stderr
    assert deployment.processes() == []
    assert deployment.listening() == []
    assert not deployment.state.exists(), list(deployment.state.rglob("*"))
    again = deployment.script("--stop")
    assert again.returncode == 0
    assert "nothing was running" in again.stderr


def test_without_a_key_or_demo_the_script_names_the_setting(deployment: Deployment) -> None:
    refused = deployment.script()
    assert refused.returncode == 2
    assert "ANTHROPIC_API_KEY" in refused.stderr
    assert "--demo" in refused.stderr
    assert not deployment.state.exists()


def test_unknown_arguments_are_rejected(deployment: Deployment) -> None:
    refused = deployment.script("--dmeo")
    assert refused.returncode == 2
    assert "--dmeo" in refused.stderr


def test_missing_system_packages_are_named_with_the_install_command(deployment: Deployment, tmp_path: Path) -> None:
    python = tmp_path / "python-without-venv"
    python.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    lacking = Deployment(
        deployment.state,
        deployment.ports,
        deployment.environment | {"PYTHON": str(python), "HYPERCORE_VENV": str(tmp_path / "venv")},
    )
    refused = lacking.script("--demo")
    assert refused.returncode == 2
    assert "apt-get install -y python3-venv" in refused.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("MIN_AGENTS", "many", "MIN_AGENTS"),
        ("LISTEN_ADDR", "127.0.0.1:port", "LISTEN_ADDR"),
        ("LISTEN_ADDR", "0.0.0.0:0", "ENABLE_AUTH"),
        ("DATABASE_URL", "mysql://user:secret-word@host/name", "DATABASE_URL"),
    ],
)
def test_invalid_settings_are_named_and_leave_nothing_running(
    deployment: Deployment, name: str, value: str, named: str
) -> None:
    bad = Deployment(deployment.state, deployment.ports, deployment.environment | {name: value})
    refused = bad.script("--demo")
    assert refused.returncode == 2
    assert named in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "secret-word" not in refused.stderr
    assert bad.processes() == []
    assert bad.listening() == []
