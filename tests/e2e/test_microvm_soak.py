"""A soak test of microVM agents under load, enabled by MICROVM_SOAK_MINUTES (30 for a full run).

Two pool agents serve 20 users with one session each. No VM may be killed or replaced, and memory must be accounted as
it is used: a VM's control group is charged with the VM's private memory, and templates count with their memfds.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hypercore_agents.compute.host.shims import memory_kills
from hypercore_agents.compute.microvm.image import Image
from support.descriptors import descriptors
from support.microvm_backend import cannot_run
from support.ports import free_port

MINUTES = float(os.environ.get("MICROVM_SOAK_MINUTES", "0"))
USERS, AGENTS = 20, 2
START_SECONDS, LOOK_SECONDS = 600.0, 5.0
SHARE, PROGRAM_MB = 0.05, 8
"""Tolerance of an account. The pages of QEMU's program are charged to the process that touched them first."""

pytestmark = [
    pytest.mark.skipif(MINUTES <= 0, reason="MICROVM_SOAK_MINUTES is not set"),
    pytest.mark.timeout(60 * MINUTES + 2 * START_SECONDS),
]


@dataclass
class Soak:
    """The platform under load, seen from the host."""

    url: str
    state: Path
    process: "subprocess.Popen[bytes]"

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all agents' VMs that are complete."""
        found = []
        for path in (self.state / "demo/microvm/sandboxes").glob("*/record.json"):
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(path.read_text())
                if record["kept"]:
                    found.append(record)
        return found

    def accounts(self) -> list[tuple[str, float, float]]:
        """Return for each VM and template the accounted memory and the memory that it really uses, in MB."""
        found = []
        for record in self.records():
            charged = next(
                int(path.read_text()) / 2**20 - file_cache_mb(path.with_name("memory.stat"))
                for group in record["cgroups"]
                for path in (Path(group, "memory.usage_in_bytes"), Path(group, "memory.current"))
                if path.exists()
            )
            found.append((record["agent_id"], charged, private_mb(record["machine"]["pid"])))
        for path in (self.state / "demo/microvm/templates").glob("*/template.json"):
            description = json.loads(path.read_text())
            holder = description["holder"]["pid"]
            parts = (number for number, target in descriptors(holder) if "/memfd:hypercore" in target)
            blocks = sum(os.stat(f"/proc/{holder}/fd/{part}").st_blocks for part in parts)
            found.append((path.parent.name, description["size_mb"], blocks * 512 / 2**20))
        return found


def file_cache_mb(statistics: Path) -> float:
    """Return the part of a group's charges that is page cache of the VM's disk, which the kernel frees on demand."""
    lines = (line.split() for line in statistics.read_text().splitlines())
    return sum(int(value) for name, value in lines if name in ("inactive_file", "active_file")) / 2**20


def private_mb(pid: int) -> float:
    """Return the private memory of a process with its page tables, without the pages of a template."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    lines += Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "VmPTE:"))) / 1024


@pytest.fixture
def soak(tmp_path: Path, guest_image: Image) -> Iterator[Soak]:
    """The demo with two microVM agents of the smallest size."""
    lacking = cannot_run()
    if lacking:
        pytest.skip(lacking)
    names = ("LISTEN_ADDR", "GATEWAY_ADDR", "SIMULATOR_LISTEN", "AUTOSCALER_ADDR")
    addresses = {name: f"127.0.0.1:{free_port()}" for name in names}
    environment = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "HYPERCORE_IMAGE_DIR")},
        **addresses, "STATE_DIR": str(tmp_path / "state"), "MIN_AGENTS": str(AGENTS), "MAX_AGENTS": str(AGENTS),
        "POOL_CONFIG": json.dumps({"cores": 1, "memory": 1024}), "BOOT_TIMEOUT": "600", "START_TIMEOUT": "600",
    }  # fmt: skip
    command = [sys.executable, "-m", "hypercore_agents"]
    with (tmp_path / "log").open("wb") as log:
        up = [*command, "up", "--demo", "--backend", "microvm"]
        process = subprocess.Popen(up, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        yield Soak(f"http://{addresses['LISTEN_ADDR']}", tmp_path / "state", process)
    finally:
        process.terminate()
        process.wait(150)


async def test_no_microvm_is_killed_and_memory_is_accounted_as_it_is_used(soak: Soak) -> None:
    outcomes: Counter[int] = Counter()
    worst: dict[str, float] = {}

    async def use(client: aiohttp.ClientSession, number: int, until: float) -> None:
        session_id = None
        while time.monotonic() < until:
            body = {
                "user_id": f"user-{number}",
                "prompt": '[[tool Bash {"command": "head -c 2000000 /dev/zero > f"}]] [[say ok]]',
            }
            if session_id is not None:
                body["session_id"] = session_id
            with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                async with client.post(f"{soak.url}/v1/agent/chat", json=body) as answer:
                    outcomes[answer.status] += 1
                    if answer.status == 200:
                        session_id = (await answer.json())["session_id"]
            await asyncio.sleep(1)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=320)) as client:
        async with asyncio.timeout(START_SECONDS):
            while len(soak.records()) < AGENTS:
                assert soak.process.poll() is None, (soak.state.parent / "log").read_text()
                await asyncio.sleep(1)
        before = {record["agent_id"]: record["machine"] for record in soak.records()}
        until = time.monotonic() + 60 * MINUTES
        users = [asyncio.create_task(use(client, number, until)) for number in range(USERS)]
        while time.monotonic() < until:
            for name, accounted, used in soak.accounts():
                off = max(0.0, abs(accounted - used) - PROGRAM_MB) / used
                worst[name] = max(worst.get(name, 0.0), off)
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.gather(*users)
    after = {record["agent_id"]: record["machine"] for record in soak.records()}
    print(f"turns by status: {dict(outcomes)}; worst accounts: {worst}")  # noqa: T201
    assert after == before, "a microVM was replaced"
    assert [memory_kills(record["cgroups"]) for record in soak.records()] == [0] * AGENTS
    assert outcomes[200] > 0
    assert all(off <= SHARE for off in worst.values()), worst
