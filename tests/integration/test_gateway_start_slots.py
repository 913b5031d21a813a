"""Start slots of the gateway's machine: shared by its agents, and released when an agent disconnects."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from hypercore_agents.agent.gateway.client import GatewayClient
from hypercore_agents.api.internal import AgentToken
from hypercore_agents.gateway import start_slots
from hypercore_agents.store.database import sqlite_url
from hypercore_agents.store.tables import agents
from support.gateway_server import DEDICATED, POOL, Site, gateway_site


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "s.db"), "http://127.0.0.1:9", starts_per_host=1) as site:
        yield site


def agent(site: Site, agent_id: str) -> GatewayClient:
    token, expires_at = site.tokens.for_agent(agent_id)
    return GatewayClient(site.url, AgentToken(agent_token=token, expires_at=expires_at))


async def on_this_machine(site: Site) -> None:
    async with site.database.write() as connection:
        await connection.execute(agents.update().values(backend="microvm"))


async def test_agents_of_one_machine_share_its_slots(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await on_this_machine(site)
    monkeypatch.setattr(start_slots, "WAIT_SECONDS", 0.1)  # the request is repeated after this time
    one, two = agent(site, POOL), agent(site, DEDICATED)
    held = asyncio.Event()

    async def start() -> None:
        async with two.start_slot(wait=True) as granted:
            assert granted
            held.set()

    async with one.start_slot(wait=True) as granted:
        assert granted
        async with two.start_slot(wait=False) as spare:
            assert not spare
        waiting = asyncio.create_task(start())
        await asyncio.sleep(0.3)
        assert not held.is_set()
    await waiting
    async with two.start_slot(wait=True):
        await one.close()  # a disconnected agent leaves the queue
        await two.close()
    third = agent(site, POOL)
    async with asyncio.timeout(10), third.start_slot(wait=True) as granted:
        assert granted
    await third.close()


async def test_agents_on_other_machines_are_not_limited(site: Site) -> None:
    gateway = agent(site, POOL)
    async with AsyncExitStack() as stack:
        assert all([await stack.enter_async_context(gateway.start_slot(wait=False)) for _ in range(5)])
    await gateway.close()


async def test_an_unavailable_gateway_does_not_block_starts() -> None:
    gateway = GatewayClient("http://127.0.0.1:9", AgentToken(agent_token="t", expires_at=0))
    async with gateway.start_slot(wait=True) as granted:
        assert granted
    await gateway.close()
