"""kill -9 of manager, gateway and agent at each step of spawn, chat and delete, on the whole platform.

Real processes: `up --demo` with two manager workers, the process backend, the Agent SDK's CLI, the simulator. After
each kill, within `SETTLED_SECONDS`: what is wanted, what the store says and what runs agree; the platform takes turns;
and once the agent is deleted, processes, listening sockets and files are what they were.
"""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from manager_sides import until

SETTLED_SECONDS = 60.0
CASES = [
    *itertools.product(("spawn starting", "stream", "delete asked"), ("worker", "gateway", "agent")),
    ("spawn asked", "manager"),
]
"""When, and who: `worker` is every manager process but their parent, `manager` the parent."""
pytestmark = [pytest.mark.timeout(300)]


@dataclass
class Platform:
    """What `up` runs."""

    state: Path
    url: str
    http: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: Any = None, **params: str) -> tuple[int, Any]:
        """Ask; a connection that is cut is status 0."""
        try:
            async with self.http.request(method, self.url + path, json=body, params=params) as answer:
                return answer.status, await answer.json()
        except (aiohttp.ClientError, TimeoutError):
            return 0, None

    def processes(self) -> dict[int, str]:
        """Command lines of all that belongs to this platform, by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit() or int(entry.name) == os.getpid():
                    continue
                command = (entry / "cmdline").read_bytes()
                if str(self.state).encode() in command + (entry / "environ").read_bytes():
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
        return {pid: command for pid, command in found.items() if command}

    def of_agent(self, agent_id: str) -> list[int]:
        """Return what runs in an agent's sandbox: its launcher, its server, its Claude CLIs."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"AGENT_ID={agent_id}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return [pid for pid in found if pid not in self.shims().values()]

    def shims(self) -> dict[str, int]:
        """Return the process that watches over each sandbox, by agent."""
        return {
            command.rpartition("shim.py ")[2].split()[0]: pid
            for pid, command in self.processes().items()
            if "shim.py " in command
        }

    def kill(self, victim: str, agent_id: str) -> None:
        """Kill -9; an agent that has no process yet is not there to be killed."""
        ends = {
            "manager": "hypercore_agents manager",
            "gateway": "hypercore_agents gateway",
        }
        if victim == "agent":
            doomed = self.of_agent(agent_id)
        elif victim == "worker":
            doomed = [pid for pid, command in self.processes().items() if "hypercore_agents.manager.worker" in command]
        else:
            doomed = [pid for pid, command in self.processes().items() if command.endswith(ends[victim])]
        assert doomed or victim == "agent", self.processes()
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def counts(self) -> dict[str, Any]:
        """Count processes by kind, listening sockets and files."""
        processes = self.processes()
        kinds = Counter(_role(command) for command in processes.values())
        del kinds[""]
        inodes = {
            line.split()[9]
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
            if line.split()[3] == "0A"
        }
        held = set()
        for pid in processes:
            with contextlib.suppress(OSError):
                for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        held.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        files = [str(path.relative_to(self.state)) for path in self.state.rglob("*") if path.is_file()]
        # Metrics of dead workers are kept, SQLite makes and removes its own files; sessions' files are the pool's.
        kept = Counter(
            Path(name).name
            for name in files
            if not name.startswith("demo/metrics") and "/store.db" not in name and "/work/" not in name
        )
        return {"processes": dict(kinds), "listening": len(held & inodes), "files": dict(kept)}

    async def agent(self, agent_id: str) -> str:
        """Return an agent's status, empty while nobody answers."""
        status, found = await self.call("GET", "/v1/agents/get", agent_id=agent_id)
        return str(found["status"]) if status == 200 else ""

    async def agrees(self) -> bool:
        """Say whether the agents that the store calls running are those that run, and the pool is whole."""
        status, listed = await self.call("GET", "/v1/agents/list")
        status_too, stats = await self.call("GET", "/v1/agents/stats")
        if (status, status_too) != (200, 200):
            return False
        running = {agent["agent_id"] for agent in listed["agents"] if agent["status"] == "running"}
        if len(running) != listed["count"] or stats["pool"]["running"] != stats["pool"]["desired"]:
            return False
        return set(self.shims()) == running and all(self.of_agent(agent_id) for agent_id in running)

    async def takes_turns(self) -> bool:
        """Say whether the pool answers a chat."""
        status, answer = await self.call("POST", "/v1/agent/chat", {"user_id": "bob", "prompt": "hello"})
        if status != 200:
            return False
        return (await self.call("DELETE", f"/v1/agent/session/{answer['session_id']}"))[0] == 200


def _role(command: str) -> str:
    for role in ("shim.py", "manager.worker", "hypercore_agents manager", "hypercore_agents gateway"):
        if role in command:
            return role
    return ""


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("kills") / "state"
    folder.mkdir()
    manager, gateway, simulator, autoscaler = (f"127.0.0.1:{_port()}" for _ in range(4))
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ}
    environment = kept | {
        "STATE_DIR": str(folder), "LISTEN_ADDR": manager, "GATEWAY_ADDR": gateway, "SIMULATOR_LISTEN": simulator,
        "AUTOSCALER_ADDR": autoscaler, "MIN_AGENTS": "1", "MAX_AGENTS": "1", "WORKER_COUNT": "2",
        "COMPUTE_BACKEND": "process", "RATE_LIMIT_PER_MINUTE": "0", "RATE_LIMIT_PER_HOUR": "0", "LOG_LEVEL": "WARNING",
    }  # fmt: skip
    with (folder.parent / "log").open("w") as log:
        platform = subprocess.Popen(
            [sys.executable, "-m", "hypercore_agents", "up", "--demo"],
            env=environment, cwd=folder.parent, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield folder, f"http://{manager}"
        finally:
            platform.terminate()
            platform.wait(120)
            shutil.rmtree(folder, ignore_errors=True)


@pytest_asyncio.fixture
async def platform(state: tuple[Path, str]) -> AsyncIterator[Platform]:
    folder, url = state
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=60), connector=aiohttp.TCPConnector(force_close=True)
    ) as http:
        found = Platform(folder, url, http)
        await until(found.agrees, seconds=120)
        await until(found.takes_turns, seconds=60)
        yield found


@pytest.mark.parametrize(("step", "victim"), CASES)
async def test_after_a_kill_all_agrees_and_nothing_is_left(platform: Platform, step: str, victim: str) -> None:
    before = platform.counts()
    body = {"user_id": "ada", "cores": 1, "memory": 1024}
    status, spawned = await platform.call("POST", "/v1/agents/spawn", body, wait="false")
    assert status == 202, spawned
    agent_id = spawned["agent_id"]
    if step == "spawn starting":
        await until(lambda: platform.of_agent(agent_id), seconds=SETTLED_SECONDS)
    if step.startswith("spawn"):
        platform.kill(victim, agent_id)

    async def decided() -> bool:
        return await platform.agent(agent_id) in ("running", "failed")

    await until(decided, seconds=SETTLED_SECONDS)
    if not step.startswith("spawn"):
        assert await platform.agent(agent_id) == "running"
    if step in ("chat", "stream"):
        await turn_cut_short(platform, agent_id, victim, stream=step == "stream")
    if step == "delete asked":
        asked = asyncio.create_task(platform.call("DELETE", "/v1/agents/delete", agent_id=agent_id))
        await until(lambda: wanted_stopped(platform, agent_id), seconds=SETTLED_SECONDS)
        platform.kill(victim, agent_id)
        await asked
    await until(platform.agrees, seconds=SETTLED_SECONDS)

    async def deleted() -> bool:
        await platform.call("DELETE", "/v1/agents/delete", agent_id=agent_id)
        return await platform.agent(agent_id) in ("stopped", "failed")

    await until(deleted, seconds=SETTLED_SECONDS)
    await until(platform.takes_turns, seconds=SETTLED_SECONDS)
    await until(platform.agrees, seconds=SETTLED_SECONDS)
    try:
        await until(lambda: platform.counts() == before, seconds=SETTLED_SECONDS)
    except AssertionError:
        assert platform.counts() == before
        raise


async def wanted_stopped(platform: Platform, agent_id: str) -> bool:
    return await platform.agent(agent_id) in ("draining", "stopped")


async def turn_cut_short(platform: Platform, agent_id: str, victim: str, *, stream: bool) -> None:
    """Kill while the model answers; whoever asked is told, or sees the connection end, and is not left waiting."""
    said = {"user_id": "ada", "prompt": "[[ttft 0.05]] [[rate 20]] [[tokens 80]]", "stream": stream}
    if not stream:
        asked = asyncio.create_task(platform.call("POST", f"/agents/{agent_id}/v1/agent/chat", said))

        async def runs() -> bool:
            status, found = await platform.call("GET", "/v1/agent/sessions", user_id="ada")
            return status == 200 and found["count"] > 0

        await until(runs, seconds=SETTLED_SECONDS)
        platform.kill(victim, agent_id)
        status, answer = await asked
        assert status in (0, 200) or answer["error"]["type"], answer
        return
    seen: list[str] = []
    killed = False
    with contextlib.suppress(aiohttp.ClientError):
        async with platform.http.post(f"{platform.url}/agents/{agent_id}/v1/agent/chat", json=said) as answer:
            assert answer.status == 200
            async for line in answer.content:
                if line.startswith(b"event: "):
                    seen.append(line[7:].strip().decode())
                if line.startswith(b"data: "):
                    json.loads(line[6:])
                if seen and seen[-1] == "delta" and not killed:
                    platform.kill(victim, agent_id)
                    killed = True
    assert killed, seen
    if victim in ("gateway", "agent"):
        assert seen[-1] in ("result", "error"), seen
