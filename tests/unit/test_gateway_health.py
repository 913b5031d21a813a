"""Health checks of the gateway: every dependency with its latency, and a hanging one delays no caller."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from hypercore_agents.gateway import health
from hypercore_agents.gateway.health import Health
from hypercore_agents.kit.relay.relay import Relay
from hypercore_agents.observability.metrics import GatewayMetrics
from hypercore_agents.security.sealing import KeyRing
from hypercore_agents.store.blobs import Blobs
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate


def health_of(database: Database, relay: Relay, url: str, folder: Path) -> Health:
    metrics = GatewayMetrics(CollectorRegistry())
    return Health(database, Blobs(None, folder / "blobs"), relay, url, KeyRing.generate, metrics)


@contextlib.asynccontextmanager
async def silent() -> AsyncIterator[tuple[str, list[int]]]:
    """Run a server that accepts connections and sends nothing; yield its URL and its connections."""
    connections: list[int] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections
    finally:
        server.close()


async def test_a_silent_api_is_reported_in_time_with_one_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_API_SECONDS", 0.3)
    database, relay = Database(sqlite_url(tmp_path / "store.db")), Relay()
    await migrate(database)
    try:
        async with silent() as (url, connections), asyncio.timeout(20):
            health_checks = health_of(database, relay, url, tmp_path)
            reports = await asyncio.gather(*(health_checks.report() for _ in range(20)))
            for report, serving in reports:
                assert serving
                assert report["status"] == "degraded"
                assert report["dependencies"] == {
                    "store": "ok",
                    "key_ring": "ok",
                    "blobs": "ok",
                    "claude_api": "unreachable",
                }
                assert report["latency_ms"]["claude_api"] >= 250
                assert report["latency_ms"]["store"] > 0
            await health_checks.report()
            assert len(connections) == 1
    finally:
        await relay.close()
        await database.close()


async def test_a_hanging_store_is_reported_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_STORE_SECONDS", 0.2)
    monkeypatch.setattr(health, "_API_SECONDS", 0.2)
    database, relay = Database(sqlite_url(tmp_path / "store.db")), Relay()

    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(database, "check_writes", hang)
    try:
        async with silent() as (url, _), asyncio.timeout(20):
            report, serving = await health_of(database, relay, url, tmp_path).report()
        assert not serving
        assert report["status"] == "unavailable"
        assert report["dependencies"]["store"] == "unavailable"
        assert report["latency_ms"]["store"] >= 150
    finally:
        await relay.close()
        await database.close()
