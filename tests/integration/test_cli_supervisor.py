"""The supervisor of `up` with real child processes: readiness, restarts, giving up, and the death of the parent."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.supervisor import Supervisor
from support.supervised_child import simulator


async def answers(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as client, client.get(url) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def until_answers(url: str) -> None:
    async with asyncio.timeout(30):
        while not await answers(url):
            await asyncio.sleep(0.02)


async def test_killed_children_restart_and_stop_ends_all() -> None:
    child, messages = simulator(), list[str]()
    supervisor = Supervisor([child], messages.append)
    ready = asyncio.Event()
    running = asyncio.create_task(supervisor.run(start_seconds=30, on_ready=ready.set))
    await asyncio.wait_for(ready.wait(), 30)
    assert child.process is not None
    first = child.process.pid
    child.process.kill()
    async with asyncio.timeout(30):
        while child.process.pid == first:
            await asyncio.sleep(0.02)
    await until_answers(child.ready_url)
    supervisor.stop.set()
    await asyncio.wait_for(running, 30)
    assert not await answers(child.ready_url)
    assert any("simulator ended with status -9" in line for line in messages)


async def test_a_child_that_exits_immediately_is_named() -> None:
    child = simulator()
    child.arguments = ["no-such-command"]
    with pytest.raises(CommandError, match="simulator ended with status"):
        await Supervisor([child], lambda _: None).run(start_seconds=30, on_ready=lambda: None)


async def test_a_child_that_never_becomes_ready_is_stopped_and_named() -> None:
    child = simulator()
    child.ready_url += "/no-such-route"
    with pytest.raises(CommandError, match="not ready after 1 s"):
        await Supervisor([child], lambda _: None).run(start_seconds=1, on_ready=lambda: None)
    assert child.process is not None
    assert child.process.returncode is not None


async def test_repeated_deaths_of_a_child_end_the_supervisor() -> None:
    child, messages = simulator(), list[str]()
    supervisor = Supervisor([child], messages.append)

    def sabotage() -> None:
        assert child.process is not None
        child.arguments = ["no-such-command"]
        child.process.kill()

    with pytest.raises(CommandError, match="simulator died 5 times"):
        await asyncio.wait_for(supervisor.run(start_seconds=30, on_ready=sabotage), 60)


_PARENT = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from hypercore_agents.cli.supervisor import Supervisor
from support.supervised_child import simulator
child = simulator()
async def main():
    await Supervisor([child], print).run(
        start_seconds=30, on_ready=lambda: print(child.process.pid, child.ready_url, flush=True))
asyncio.run(main())
"""


async def test_children_end_when_the_supervisor_is_killed() -> None:
    script = _PARENT.format(tests=str(Path(__file__).parents[1]))
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(parent.stdout.readline), 30)
        pid, url = line.split()
        assert await answers(url)
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while await answers(url):
            assert time.monotonic() < deadline, f"process {pid} outlived its supervisor"
            await asyncio.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
