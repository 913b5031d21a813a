"""Fixtures: a stand-in gateway in front of the simulator, and an agent that is enrolled there."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from support.agent_server import Agent, StandInGateway, served_agent, stand_in_gateway
from support.simulator_fixtures import RunningSimulator


@pytest_asyncio.fixture
async def gateway(simulator: RunningSimulator) -> AsyncIterator[StandInGateway]:
    """Serve a stand-in gateway that relays to the simulator."""
    async with stand_in_gateway(simulator.url) as running:
        yield running


@pytest_asyncio.fixture
async def agent(gateway: StandInGateway, tmp_path: Path) -> AsyncIterator[Agent]:
    """Serve an agent without a launcher: its sessions share its user."""
    async with served_agent(gateway, tmp_path / "agent") as running:
        yield running
