"""Run the whole platform on free loopback ports with its own state folder for the duration of a benchmark."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp


@dataclass(frozen=True)
class LocalPlatform:
    """Base URLs of the running services."""

    manager: str
    simulator: str


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def local_platform(agents: int, *, backend: str = "process", **settings: str) -> AsyncIterator[LocalPlatform]:
    """Run `hypercore-agents up --demo` with this many pool agents until the block ends."""
    ports = [free_port() for _ in range(4)]
    manager, simulator = f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[2]}"
    with tempfile.TemporaryDirectory(prefix="hypercore-benchmark-") as state:
        environment = {k: v for k, v in os.environ.items() if k != "ANTHROPIC_API_KEY"} | {
            "STATE_DIR": state,
            "LISTEN_ADDR": f"127.0.0.1:{ports[0]}",
            "GATEWAY_ADDR": f"127.0.0.1:{ports[1]}",
            "SIMULATOR_LISTEN": f"127.0.0.1:{ports[2]}",
            "AUTOSCALER_ADDR": f"127.0.0.1:{ports[3]}",
            "MIN_AGENTS": str(agents),
            "MAX_AGENTS": str(agents),
            "LOG_LEVEL": "WARNING",
            "RATE_LIMIT_PER_MINUTE": "1000000",
            "RATE_LIMIT_PER_HOUR": "1000000",
            **settings,
        }
        log = Path(state) / "benchmark.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "hypercore_agents", "up", "--demo", "--backend", backend],
                env=environment, cwd=state, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            await _until_warm(manager, agents, process, log, seconds=180 if backend == "process" else 1200)
            yield LocalPlatform(manager, simulator)
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, 90)


async def _until_warm(
    manager: str, agents: int, process: subprocess.Popen[bytes], log: Path, *, seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession() as client:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the platform did not start:\n{log.read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(aiohttp.ClientError):
                async with client.get(f"{manager}/v1/agents/stats") as answer:
                    if (await answer.json())["pool"]["running"] >= agents:
                        return
            await asyncio.sleep(0.1)
