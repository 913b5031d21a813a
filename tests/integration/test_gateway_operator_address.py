"""The operator's address of a real gateway process, separate from that of the sandboxes."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp

from support.ports import free_address


async def status(url: str) -> int:
    try:
        async with aiohttp.ClientSession() as client, client.get(url) as answer:
            return answer.status
    except aiohttp.ClientError:
        return 0


async def test_only_the_operator_address_serves_metrics_and_health(tmp_path: Path) -> None:
    sandboxes, operator = free_address(), free_address()
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "HOME")} | {
        "STATE_DIR": str(tmp_path / "state"),
        "GATEWAY_ADDR": sandboxes,
        "GATEWAY_OPERATOR_ADDR": operator,
        "CLAUDE_API_URL": "http://127.0.0.1:9",
    }
    gateway = subprocess.Popen([sys.executable, "-m", "hypercore_agents", "gateway"], env=environment, cwd=tmp_path)
    try:
        async with asyncio.timeout(30):
            while await status(f"http://{sandboxes}/ready") != 200:
                assert gateway.poll() is None
                await asyncio.sleep(0.05)
        assert [await status(f"http://{operator}{path}") for path in ("/metrics", "/health", "/ready")] == [
            200,
            200,
            404,
        ]
        assert [await status(f"http://{sandboxes}{path}") for path in ("/metrics", "/health")] == [404, 404]
        gateway.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.wait, 30) in (0, -signal.SIGTERM)
        assert await status(f"http://{operator}/metrics") == 0
    finally:
        gateway.kill()
        gateway.wait()
