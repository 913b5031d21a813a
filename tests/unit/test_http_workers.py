"""Workers on one address: restarting one that could not be started."""

import asyncio
import os

import pytest

from hypercore_agents.http.workers import Worker, shared_listeners


async def test_a_worker_that_cannot_be_started_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    (listener,) = shared_listeners("127.0.0.1", 0, 1, "LISTEN_ADDR")
    start, refusals = asyncio.create_subprocess_exec, [OSError(12, os.strerror(12))]
    ran = asyncio.Event()

    async def scarce(*command: str, **options: object) -> asyncio.subprocess.Process:
        if refusals:
            raise refusals.pop()
        process = await start(*command, **options)  # type: ignore[arg-type]
        ran.set()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
    worker = Worker(0, listener, ("timeit", "-n", "1", "input()"))
    supervising = asyncio.create_task(worker.supervise())
    async with asyncio.timeout(30):
        await ran.wait()
    supervising.cancel()
    await asyncio.gather(supervising, return_exceptions=True)
    assert worker.running
    await worker.stop(5)
    assert not worker.running
