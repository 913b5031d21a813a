"""Fixture of a served manager whose pool has one running agent."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from support.manager_server import Deployment, deployed


@pytest_asyncio.fixture
async def pooled(tmp_path: Path) -> AsyncIterator[Deployment]:
    """A manager with a pool of one running agent."""
    async with deployed(tmp_path / "state", min_agents=1) as running:
        await running.warm(1)
        yield running
