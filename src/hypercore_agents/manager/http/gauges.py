"""Gauges derived from the store and the disk at each scrape, so that all manager processes report the same values.

Nothing is counted in memory: a process that has just started, or does not lead, reports correct values too.
"""

import contextlib
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.compute.base import HostUsage, SandboxError
from hypercore_agents.manager.fleet.pool import PoolShape
from hypercore_agents.observability.metrics import ManagerMetrics
from hypercore_agents.store import agents, keys, placement, pools
from hypercore_agents.store.database import Database

KEYS_SECONDS = 60.0
"""How long the ages of keys are cached: reading them scans a table."""


class StoreGauges:
    """Sets the manager's gauges. `clock` returns Unix seconds; `host` returns the usage of the backend's host."""

    def __init__(
        self,
        database: Database,
        metrics: ManagerMetrics,
        shape: PoolShape,
        *,
        state_dir: Path,
        key_file: Path,
        clock: Callable[[], float],
        host: Callable[[], Awaitable[HostUsage | None]],
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._shape = shape
        self._state_dir = state_dir
        self._key_file = key_file
        self._clock = clock
        self._host = host
        self._keys_cached_until = 0.0

    async def refresh(self) -> None:
        """Update the gauges. Raises Unavailable if the store does not respond."""
        metrics, now = self._metrics, self._clock()
        async with self._database.read() as connection:
            states = await agents.count_states(connection)
            placed = await placement.count_placed(connection)
            pool = await pools.get_pool(connection)
            oldest = await keys.oldest_keys(connection) if now >= self._keys_cached_until else None
        of_pool = states[AgentKind.POOL]
        metrics.agents.set(sum(of_kind[AgentState.RUNNING] for of_kind in states.values()))
        metrics.pool_running.set(of_pool[AgentState.RUNNING])
        metrics.pool_agents.labels("starting").set(of_pool[AgentState.PENDING] + of_pool[AgentState.STARTING])
        metrics.pool_agents.labels("running").set(of_pool[AgentState.RUNNING])
        metrics.pool_agents.labels("draining").set(of_pool[AgentState.DRAINING])
        metrics.pool_desired.set(self._shape.desired(pool))
        metrics.pool_minimum.set(self._shape.minimum)
        metrics.pool_maximum.set(self._shape.maximum)
        metrics.sessions.set(placed)
        disk = shutil.disk_usage(self._state_dir)
        metrics.state_free.set(disk.free)
        metrics.state_size.set(disk.total)
        await self._refresh_host()
        if oldest is not None:
            self._keys_cached_until = now + KEYS_SECONDS
            # Each rotation replaces the file, so its modification time is that of the newest key.
            with contextlib.suppress(OSError):
                oldest["encryption"] = self._key_file.stat().st_mtime
            for kind in metrics.KEYS:
                metrics.key_age.labels(kind).set(max(0.0, now - oldest[kind]) if kind in oldest else 0)

    async def _refresh_host(self) -> None:
        try:
            usage = await self._host()
        except SandboxError:
            return
        if usage is None:
            return
        mega = 1 << 20
        self._metrics.host_memory_charged.set((usage.memory_charged_mb or 0) * mega)
        self._metrics.host_load.set(usage.load)
        self._metrics.host_processors.set(os.cpu_count() or 0)
        self._metrics.host_sandboxes.set(usage.sandboxes)
        for name, value in {
            ("cores", "for_agents"): usage.cores,
            ("cores", "given"): usage.cores_used,
            ("memory", "for_agents"): usage.memory_mb * mega,
            ("memory", "given"): usage.memory_used_mb * mega,
            ("memory", "free"): usage.memory_free_mb * mega,
            ("disk", "for_agents"): usage.disk_mb * mega,
            ("disk", "given"): usage.disk_used_mb * mega,
            ("disk", "free"): usage.disk_free_mb * mega,
        }.items():
            self._metrics.host[name].set(value)
