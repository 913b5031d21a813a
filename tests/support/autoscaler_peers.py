"""Stand-ins for the autoscaler's peers: a manager with a real compare-and-set, and Prometheus' query API."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from hypercore_agents.api.errors import Conflict
from hypercore_agents.api.pool import PoolSize
from hypercore_agents.http.errors import install_error_handlers
from support.ports import free_address


class StandInManager:
    """Holds the size of a pool; `running` follows it immediately. Attributes turn faults on."""

    def __init__(self, desired: int = 10, *, token: str | None = None) -> None:
        self.size = PoolSize(desired=desired, version=1)
        self.sessions: Any = 0
        self.running: int | None = None
        self.writes: list[PoolSize] = []
        self.refused = 0
        self.hang = asyncio.Event()
        self.hang.set()
        self.raw: Response | None = None
        self.write_status: int | None = None
        self.between: int | None = None
        """Another writer sets this size between the next GET and PUT."""
        self.stats_extra: dict[str, Any] = {}
        self.authorization: set[str | None] = set()
        self.token = token
        self.app = FastAPI()
        install_error_handlers(self.app)
        self.app.add_api_route("/v1/pool", self._get, methods=["GET"])
        self.app.add_api_route("/v1/pool", self._put, methods=["PUT"])
        self.app.add_api_route("/v1/agents/stats", self._stats, methods=["GET"])

    async def _get(self, request: Request) -> Any:
        self.authorization.add(request.headers.get("authorization"))
        await self.hang.wait()
        if self.raw is not None:
            return self.raw
        return self.size

    async def _put(self, wanted: PoolSize) -> Any:
        if self.between is not None:
            self.size = PoolSize(desired=self.between, version=self.size.version + 1)
            self.between = None
        if self.write_status is not None:
            return JSONResponse({"error": "broken"}, status_code=self.write_status)
        if wanted.version != self.size.version:
            self.refused += 1
            raise Conflict("another write came first")
        self.size = PoolSize(desired=wanted.desired, version=wanted.version + 1)
        self.writes.append(self.size)
        return self.size

    async def _stats(self) -> Any:
        running = self.size.desired if self.running is None else self.running
        pool = {"desired": self.size.desired, "running": running, "starting": 0, "draining": 0}
        return {
            "total_agents": running,
            "users": 0,
            "agents_per_user": {},
            "agents_by_status": {},
            "pool": {**pool, "sessions": self.sessions},
            "sessions": 0,
            "capacity": 100 * running,
            **self.stats_extra,
        }


class StandInPrometheus:
    """Answers a query with the first of `values` whose key is its prefix, otherwise with an empty vector."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.raw: Response | None = None
        self.queries: list[str] = []
        self.app = FastAPI()
        self.app.add_api_route("/api/v1/query", self._query, methods=["GET"])

    def healthy(self, *, sessions: float, running: int) -> None:
        """Set the answers of a healthy pool."""
        self.values = {
            "sum((agent_active_sessions": sessions,
            "count((agent_active_sessions": running,
            "time() - max(timestamp(agent_active_sessions": 3.0,
            "max((hypercore_pool_running": running,
            "time() - max(timestamp(hypercore_pool_running": 2.0,
        }

    async def _query(self, query: str) -> Any:
        self.queries.append(query)
        if self.raw is not None:
            return self.raw
        value = next((value for key, value in self.values.items() if query.startswith(key)), None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        result = [{"metric": {}, "value": [1000.0, str(value)]} for value in values]
        return {"status": "success", "data": {"resultType": "vector", "result": result}}


@contextlib.asynccontextmanager
async def prometheus(configuration: str, folder: Path) -> AsyncIterator[str]:
    """Run a real Prometheus with this configuration; yield its base URL."""
    address = free_address()
    (folder / "prometheus.yml").write_text(configuration)
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        await process.wait()
