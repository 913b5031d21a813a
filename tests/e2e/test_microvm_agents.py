"""The platform with agents in microVMs: spawned from a snapshot, a turn with the real CLI in the guest, its end.

`up --demo --backend microvm` as a user starts it; the model is the simulator behind the gateway, outside.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent_sides import free_port, tool
from compute_microvms import cannot_run
from hypercore_agents.compute.microvm.image import Image

START_SECONDS = 240.0


@dataclass
class Platform:
    """An `up` with microVMs."""

    url: str
    state: Path
    process: subprocess.Popen[bytes]
    log: Path

    def machines(self) -> list[str]:
        """Return the command lines of shims, keepers and QEMUs that this platform started."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                if (
                    entry.name.isdigit()
                    and "compute.microvm" in command
                    and _descends(int(entry.name), self.process.pid)
                ):
                    found.append(command)
        return found


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


@pytest.fixture
def platform(guest_image: Image, tmp_path: Path) -> Iterator[Platform]:
    lacking = cannot_run()
    if lacking:
        pytest.skip(lacking)
    ports = [free_port() for _ in range(4)]
    names = ("LISTEN_ADDR", "GATEWAY_ADDR", "SIMULATOR_LISTEN", "AUTOSCALER_ADDR")
    environment = {
        **os.environ,
        **{name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)},
        "STATE_DIR": str(tmp_path / "state"),
        "MIN_AGENTS": "0",
        "START_TIMEOUT": str(START_SECONDS),
        "SCRATCH_MB": "512",
    }
    environment.pop("ANTHROPIC_API_KEY", None)
    log = tmp_path / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "hypercore_agents", "up", "--demo", "--backend", "microvm"],
            env=environment, cwd=tmp_path, stdout=output, stderr=output,
        )  # fmt: skip
    platform = Platform(f"http://127.0.0.1:{ports[0]}", tmp_path / "state", process, log)
    try:
        yield platform
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=START_SECONDS)) as client:
        yield client


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with http.post(url, json=body) as answer:
        return answer.status, await answer.json()


async def _ready(http: aiohttp.ClientSession, platform: Platform) -> None:
    async with asyncio.timeout(90):
        while True:
            assert platform.process.poll() is None, platform.log.read_text()
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(f"{platform.url}/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


@pytest.mark.timeout(600)
async def test_an_agent_lives_in_a_microvm_from_spawn_to_delete(
    platform: Platform, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await _ready(http, platform)
    assert "agents run in microVMs" in platform.log.read_text()
    small = {"user_id": "ada", "cores": 1, "memory": 1024, "timeout": 300}

    status, refused = await post(http, f"{platform.url}/v1/agents/spawn", {**small, "memory": 256})
    assert status == 400
    assert "memory: a virtual machine needs at least 512 MB" in refused["error"]["message"]
    status, refused = await post(http, f"{platform.url}/v1/agents/spawn", {**small, "gpu_quota": 1024})
    assert status == 400
    assert "gpu_quota: the microvm backend gives no GPU" in refused["error"]["message"]

    status, agent = await post(http, f"{platform.url}/v1/agents/spawn", small)
    assert status == 200, agent
    status, second = await post(http, f"{platform.url}/v1/agents/spawn", small)
    assert status == 200, second

    chat = f"{platform.url}/agents/{agent['agent_id']}/v1/agent/chat"
    write = tool("Bash", command="echo from-the-guest > note.txt; uname -a; hostname; pwd")
    status, told = await post(http, chat, {"user_id": "ada", "prompt": write})
    assert status == 200, told
    assert told["status"] == "completed", told
    read = tool("Bash", command="cat note.txt; hostname; uname -r")
    async with http.post(
        chat,
        json={"user_id": "ada", "session_id": told["session_id"], "prompt": read, "stream": True},
    ) as answer:
        events = (await answer.read()).decode()
    assert "from-the-guest" in events
    assert agent["agent_id"] in events  # the guest's own name
    assert os.uname().release not in events
    assert not list(platform.state.rglob("note.txt"))

    assert platform.machines()
    for spawned in (agent, second):
        async with http.delete(f"{platform.url}/v1/agents/delete?agent_id={spawned['agent_id']}") as answer:
            assert answer.status == 200
    assert not list(platform.state.rglob("microvm/sandboxes/*"))
    assert not [command for command in platform.machines() if "microvm.shim" in command]
    platform.process.terminate()
    platform.process.wait(120)
    assert platform.machines() == []
    assert not list(platform.state.rglob("template.json"))
