"""The autoscaler's PromQL against a real Prometheus with real metrics: sums, coverage, staleness.

Requires `prometheus` (Debian's package of that name).
"""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry

from hypercore_agents.api.pool import ScalingReason, SignalProblem
from hypercore_agents.autoscaler.app import build
from hypercore_agents.autoscaler.json_client import JsonClient
from hypercore_agents.autoscaler.settings import AutoscalerSettings
from hypercore_agents.autoscaler.signals import PrometheusSignals, Reading
from hypercore_agents.observability.metrics import (
    CONTENT_TYPE,
    AgentMetrics,
    AutoscalerMetrics,
    GatewayMetrics,
    ManagerMetrics,
    render,
)
from support.asgi_server import serving
from support.autoscaler_peers import StandInManager, prometheus

pytestmark = pytest.mark.prometheus

CONFIGURATION = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: manager
    static_configs: [{{targets: ["{exposition}"]}}]
    metrics_path: /manager
  - job_name: agents
    relabel_configs:
      - {{source_labels: [agent], target_label: __metrics_path__, replacement: "/agent/$1"}}
    static_configs:
      - {{targets: ["{exposition}"], labels: {{agent: "0", kind: pool}}}}
      - {{targets: ["{exposition}"], labels: {{agent: "1", kind: pool}}}}
      - {{targets: ["{exposition}"], labels: {{agent: "2", kind: dedicated}}}}
"""


class Exposition:
    """The metrics of two pool agents, a dedicated agent, the manager and the gateway."""

    def __init__(self) -> None:
        self.agents = [AgentMetrics(CollectorRegistry()) for _ in range(3)]
        for agent, sessions, cpu, memory in zip(
            self.agents, (80, 75, 50), (0.4, 0.6, 1.0), (0.25, 0.5, 0.9), strict=True
        ):
            agent.active_sessions.set(sessions)
            agent.cpu.set(cpu)
            agent.memory.set(memory)
        self.manager = ManagerMetrics(CollectorRegistry())
        self.gateway = GatewayMetrics(self.manager.registry)
        self.gateway.headroom.labels("requests").set(0.7)
        self.gateway.headroom.labels("input_tokens").set(0.05)
        self.manager.pool_running.set(2)
        self.dead: set[str] = set()
        self.app = FastAPI()

        @self.app.get("/agent/{number}")
        async def agent_metrics(number: int) -> Response:
            gone = f"agent/{number}" in self.dead
            return Response(render(self.agents[number].registry), 503 if gone else 200, media_type=CONTENT_TYPE)

        @self.app.get("/manager")
        async def manager_metrics() -> Response:
            return Response(render(self.manager.registry), media_type=CONTENT_TYPE)


async def until(signals: PrometheusSignals, condition: Callable[[Reading], bool]) -> Reading:
    async with asyncio.timeout(60):
        while not condition(reading := await signals.read()):
            await asyncio.sleep(0.1)
    return reading


async def test_signals_of_a_real_prometheus_are_correct(tmp_path: Path) -> None:
    exposition = Exposition()
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(exposition.app))
        base = await stack.enter_async_context(
            prometheus(CONFIGURATION.format(exposition=url.removeprefix("http://")), tmp_path)
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        client = JsonClient(http, base, name="Prometheus", remedy="start it", timeout=5)
        signals = PrometheusSignals(client, longest_age=60)

        seen = (await until(signals, lambda r: r.observation is not None and r.observation.complete)).observation
        assert seen is not None
        # without the dedicated agent
        assert (seen.sessions, seen.running, seen.cpu, seen.memory) == (155, 2, 0.5, 0.375)
        assert 0 <= seen.age < 30
        assert (seen.api_headroom, seen.spawn_seconds, seen.queue_wait_seconds) == (0.05, None, None)

        # histograms count by their growth: most waits on one pool agent, few on the other; the third agent is dedicated
        for agent, seconds, times in zip(exposition.agents, (0.02, 4.0, 50.0), (60, 40, 900), strict=True):
            for _ in range(times):
                agent.queue_wait_seconds.observe(seconds)
        exposition.manager.spawn_seconds.observe(6.0)
        grown = await until(signals, lambda r: bool(r.observation and (r.observation.queue_wait_seconds or 0) > 3))
        assert grown.observation is not None
        assert (grown.observation.queue_wait_seconds or 0) <= 5, "the 95th percentile over the pool's two agents"
        timed = await until(signals, lambda r: bool(r.observation and r.observation.spawn_seconds))
        assert timed.observation is not None
        assert 5 < (timed.observation.spawn_seconds or 0) <= 7.5

        manager = StandInManager(desired=2)
        manager_url = await stack.enter_async_context(serving(manager.app))
        settings = AutoscalerSettings(_env_file=None, manager_url=manager_url, prometheus_url=base, min_agents=1)
        scaler = build(settings, http, AutoscalerMetrics(CollectorRegistry()))
        exposition.agents[0].active_sessions.set(95)
        await until(signals, lambda r: r.observation is not None and r.observation.sessions == 170)
        await scaler.step()
        assert manager.size.desired == 3
        assert scaler.decisions(1).decisions[0].reason is ScalingReason.LOAD

        exposition.dead.add("agent/1")  # a failed scrape ends its series; the running count is still two
        seen = (await until(signals, lambda r: r.observation is not None and not r.observation.complete)).observation
        assert seen is not None
        assert seen.sessions == 95

        exposition.dead.add("agent/0")
        reading = await until(signals, lambda r: r.problem is not None)
        assert reading.problem is SignalProblem.MISSING


async def test_old_samples_are_stale(tmp_path: Path) -> None:
    exposition = Exposition()
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(exposition.app))
        base = await stack.enter_async_context(
            prometheus(CONFIGURATION.format(exposition=url.removeprefix("http://")), tmp_path)
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        client = JsonClient(http, base, name="Prometheus", remedy="start it", timeout=5)
        await until(PrometheusSignals(client, longest_age=60), lambda r: r.observation is not None)
        # every sample is older than 0 s, so even the newest is too old
        reading = await until(PrometheusSignals(client, longest_age=0), lambda r: r.problem is not None)
        assert reading.problem is SignalProblem.STALE
        assert reading.detail is not None
        assert "still scraped" in reading.detail
