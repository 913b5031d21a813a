"""WORKER_COUNT: several real manager processes at one address, killed and stopped."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from hypercore_agents.store import agents
from hypercore_agents.store.database import Database
from support.ports import free_address
from support.waiting import until

REQUESTS = 60


@dataclass
class Site:
    """The parent process, the address of its workers, and its state folder."""

    process: asyncio.subprocess.Process
    url: str
    state: Path

    def workers(self) -> set[int]:
        """Return the process ids of the workers."""
        return {pid for pid in processes_of(self.state) if b"hypercore_agents.manager.worker" in command_of(pid)}

    async def get(self, path: str) -> tuple[int, str]:
        """Send a request on a new connection, so that the kernel chooses the worker."""
        async with aiohttp.ClientSession() as http, http.get(self.url + path) as answer:
            return answer.status, await answer.text()

    async def spawn(self, user_id: str) -> int:
        """Spawn an agent without waiting for it; return the status."""
        body = {"user_id": user_id, "cores": 1, "memory": 512}
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{self.url}/v1/agents/spawn?wait=false", json=body) as answer,
        ):
            return answer.status

    async def listed(self) -> float:
        """Return the count of successful requests that list agents, from the metrics."""
        status, page = await self.get("/metrics")
        assert status == 200
        found = re.findall(
            r'^hypercore_manager_requests_total\{route="/v1/agents/list",status="ok"\} (\S+)$', page, re.M
        )
        assert len(found) == 1, page  # one series, without a process label
        return float(found[0])


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def processes_of(state: Path) -> set[int]:
    """Return the processes whose environment contains this state folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(state).encode() in (entry / "environ").read_bytes():
                found.add(int(entry.name))
    return found


@contextlib.asynccontextmanager
async def running(state: Path, **variables: str) -> AsyncIterator[Site]:
    address = free_address()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "STATE_DIR")},
        "LISTEN_ADDR": address,
        "GATEWAY_ADDR": "127.0.0.1:1",
        "STATE_DIR": str(state),
        "COMPUTE_BACKEND": "process",
        "MIN_AGENTS": "0",
        "WORKER_COUNT": "2",
        "LOG_LEVEL": "ERROR",
        **variables,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hypercore_agents", "manager", env=environment, cwd=state.parent
    )
    site = Site(process, f"http://{address}", state)
    try:
        await until(lambda: ready(site), seconds=60)
        await until(lambda: len(site.workers()) == int(environment["WORKER_COUNT"]), seconds=60)
        yield site
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), 90)
    await until(lambda: not processes_of(state), seconds=60)


async def ready(site: Site) -> bool:
    assert site.process.returncode is None, "the manager ended"
    try:
        return (await site.get("/ready"))[0] == 200
    except aiohttp.ClientError:
        return False


async def test_workers_share_an_address_and_report_the_same_metrics(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(state) as site:
        statuses = await asyncio.gather(*(site.get("/v1/agents/list?user_id=ada") for _ in range(REQUESTS)))
        assert {status for status, _ in statuses} == {200}
        assert {await site.listed() for _ in range(10)} == {REQUESTS}
        assert len(list((state / "metrics").glob("*/counter_*.db"))) == 2

        # A worker that dies affects neither the requests of others nor the counts of the metrics.
        victim, other = sorted(site.workers())
        os.kill(victim, signal.SIGKILL)
        statuses = await asyncio.gather(*(site.get("/v1/agents/list?user_id=ada") for _ in range(REQUESTS)))
        assert {status for status, _ in statuses} == {200}
        await until(lambda: len(site.workers() - {victim}) == 2, seconds=60)
        assert other in site.workers()
        assert {await site.listed() for _ in range(10)} == {2 * REQUESTS}
        await a_second_manager_is_refused(site, tmp_path / "other")
    assert site.process.returncode in (0, -signal.SIGTERM)
    assert not (state / "metrics").exists()
    with socket.create_server(("127.0.0.1", int(site.url.rpartition(":")[2]))):
        pass  # the address is free again


async def a_second_manager_is_refused(site: Site, state: Path) -> None:
    """Without a check its sockets would share the address with those of the first parent."""
    second = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hypercore_agents", "manager",
        env={**os.environ, "LISTEN_ADDR": site.url.removeprefix("http://"), "WORKER_COUNT": "2",
             "STATE_DIR": str(state)},
        cwd=state.parent,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await asyncio.wait_for(second.communicate(), 60)
    assert second.returncode == 2
    assert b"cannot listen on" in said
    assert b"LISTEN_ADDR" in said
    assert b"Traceback" not in said


@pytest.mark.parametrize(
    ("store_url", "how"), [("sqlite", signal.SIGTERM), ("postgresql", signal.SIGKILL)], indirect=["store_url"]
)
async def test_quotas_hold_across_workers_and_the_last_stops_the_agents(
    tmp_path: Path, store_url: str, how: signal.Signals
) -> None:
    """If the parent is killed, the workers end and leave the agents to the next manager, which stops them."""
    state = tmp_path / "state"
    settings = {
        "MIN_AGENTS": "1", "MAX_AGENTS_PER_USER": "2", "STOP_AGENTS_ON_EXIT": "true", "STOP_GRACE": "1",
        "DATABASE_URL": store_url,
    }  # fmt: skip
    async with running(state, **settings) as site:
        statuses = await asyncio.gather(*(site.spawn("ada") for _ in range(16)))
        assert sorted(statuses) == [202] * 2 + [429] * 14
        await until(lambda: live(store_url, 3), seconds=30)
        if how == signal.SIGKILL:
            site.process.kill()
            await site.process.wait()
            await until(lambda: not site.workers(), seconds=60)
            async with running(state, **settings) as after:
                assert await live(store_url, 3)
                after.process.terminate()
                await asyncio.wait_for(after.process.wait(), 90)
        else:
            site.process.terminate()
            await asyncio.wait_for(site.process.wait(), 90)
    assert await live(store_url, 0)


async def live(store_url: str, count: int) -> bool:
    """Return whether the store has this many live agents."""
    database = Database(store_url)
    try:
        async with database.read() as connection:
            return len(await agents.list_agents(connection)) == count
    finally:
        await database.close()
