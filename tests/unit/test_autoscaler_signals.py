"""Signals are used only if present, recent and plausible; a rejected signal has a reason."""

import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from hypercore_agents.api.pool import SignalProblem
from hypercore_agents.autoscaler.json_client import JsonClient
from hypercore_agents.autoscaler.signals import ManagerSignals, PrometheusSignals, Reading
from support.asgi_server import serving
from support.autoscaler_peers import StandInManager, StandInPrometheus


@contextlib.asynccontextmanager
async def client(url: str) -> AsyncIterator[JsonClient]:
    async with aiohttp.ClientSession() as http:
        yield JsonClient(http, url, name="the other side", remedy="check its URL", timeout=2)


async def from_prometheus(prometheus: StandInPrometheus) -> Reading:
    async with serving(prometheus.app) as url, client(url) as asked:
        return await PrometheusSignals(asked, longest_age=60).read()


async def from_manager(manager: StandInManager) -> Reading:
    async with serving(manager.app) as url, client(url) as asked:
        return await ManagerSignals(asked).read()


async def test_prometheus_signals_are_sums_over_the_pool() -> None:
    prometheus = StandInPrometheus()
    prometheus.healthy(sessions=1234, running=20)
    prometheus.values |= {
        "histogram_quantile(0.9, ": 7.5,
        "avg(agent_cpu_utilisation": 0.4,
        "min(hypercore_gateway_rate_limit_headroom": 0.9,
    }
    seen = (await from_prometheus(prometheus)).observation
    assert seen is not None
    assert (seen.sessions, seen.running, seen.complete, seen.age) == (1234, 20, True, 3.0)
    assert (seen.spawn_seconds, seen.cpu, seen.memory, seen.api_headroom) == (7.5, 0.4, None, 0.9)


async def test_an_agent_without_a_report_makes_the_observation_incomplete() -> None:
    prometheus = StandInPrometheus()
    prometheus.healthy(sessions=1234, running=20)
    prometheus.values["count((agent_active_sessions"] = 19
    seen = (await from_prometheus(prometheus)).observation
    assert seen is not None
    assert not seen.complete


async def test_an_empty_pool_has_no_sessions() -> None:
    prometheus = StandInPrometheus()
    prometheus.healthy(sessions=0, running=0)
    for series in list(prometheus.values)[:3]:
        del prometheus.values[series]
    seen = (await from_prometheus(prometheus)).observation
    assert seen is not None
    assert (seen.sessions, seen.running) == (0, 0)


@pytest.mark.parametrize(
    ("key", "value", "problem", "says"),
    [
        ("sum((agent_active_sessions", None, SignalProblem.STALE, "3 s old"),
        ("max((hypercore_pool_running", None, SignalProblem.STALE, "hypercore_pool_running"),
        ("sum((agent_active_sessions", [1.0, 2.0], SignalProblem.ABSURD, "2 series"),
        ("sum((agent_active_sessions", -1.0, SignalProblem.ABSURD, "-1"),
        ("sum((agent_active_sessions", "NaN", SignalProblem.ABSURD, "nan"),
        ("sum((agent_active_sessions", 20_001.0, SignalProblem.ABSURD, "20001"),
        ("max((hypercore_pool_running", "+Inf", SignalProblem.ABSURD, "inf"),
        ("max((hypercore_pool_running", "many", SignalProblem.ABSURD, "form"),
    ],
)
async def test_impossible_values_are_rejected(key: str, value: object, problem: SignalProblem, says: str) -> None:
    prometheus = StandInPrometheus()
    prometheus.healthy(sessions=1234, running=20)
    prometheus.values[key] = value
    reading = await from_prometheus(prometheus)
    assert reading.observation is None
    assert reading.problem is problem
    assert reading.detail is not None
    assert says in reading.detail


async def test_no_series_is_reported_as_missing() -> None:
    reading = await from_prometheus(StandInPrometheus())
    assert (reading.observation, reading.problem) == (None, SignalProblem.MISSING)


async def test_absurd_optional_signals_are_treated_as_unknown() -> None:
    prometheus = StandInPrometheus()
    prometheus.healthy(sessions=1234, running=20)
    prometheus.values |= {"avg(agent_cpu_utilisation": 99.0, "avg(agent_memory_utilisation": "NaN"}
    prometheus.values |= {"histogram_quantile(0.9, ": [1.0, 2.0]}
    seen = (await from_prometheus(prometheus)).observation
    assert seen is not None
    assert (seen.cpu, seen.memory, seen.spawn_seconds) == (None, None, None)


@pytest.mark.parametrize(
    "raw",
    [
        PlainTextResponse("bad gateway", status_code=502),
        PlainTextResponse("<html>"),
        JSONResponse([1]),
        Response("[" * 100_000),
        Response(b"x" * 5_000_000),
        Response(status_code=302, headers={"location": "http://127.0.0.1:1/"}),
    ],
)
async def test_a_broken_prometheus_is_unreachable(raw: Response) -> None:
    prometheus = StandInPrometheus()
    prometheus.raw = raw
    reading = await from_prometheus(prometheus)
    assert (reading.observation, reading.problem) == (None, SignalProblem.UNREACHABLE)
    assert reading.detail is not None
    assert "check its URL" in reading.detail


async def test_a_closed_port_is_unreachable() -> None:
    async with client("http://127.0.0.1:1") as asked:
        for signals in (PrometheusSignals(asked, longest_age=60), ManagerSignals(asked)):
            reading = await signals.read()
            assert reading.problem is SignalProblem.UNREACHABLE


async def test_manager_signals_contain_the_sessions_of_the_pool() -> None:
    manager = StandInManager(desired=20)
    manager.sessions = 700
    seen = (await from_manager(manager)).observation
    assert seen is not None
    assert (seen.sessions, seen.running, seen.complete) == (700, 20, True)


async def test_manager_signals_contain_heartbeat_and_gateway_values() -> None:
    manager = StandInManager(desired=20)
    pool = {"desired": 20, "running": 20, "starting": 0, "draining": 0, "sessions": 700}
    further = {"cpu": 0.9, "memory": 0.4, "queue_wait_seconds": 3.0, "api_headroom": 0.05, "spawn_seconds": 4.0}
    manager.stats_extra = {"pool": {**pool, **further}}
    seen = (await from_manager(manager)).observation
    assert seen is not None
    assert {name: getattr(seen, name) for name in further} == further
    manager.stats_extra = {"pool": {**pool, **further, "cpu": 17.0, "queue_wait_seconds": -1}}
    seen = (await from_manager(manager)).observation
    assert seen is not None
    assert (seen.cpu, seen.queue_wait_seconds, seen.memory) == (None, None, 0.4)


async def test_all_sessions_belong_to_the_pool_without_dedicated_agents() -> None:
    manager = StandInManager(desired=20)
    manager.sessions = None
    manager.stats_extra = {"sessions": 321}
    seen = (await from_manager(manager)).observation
    assert seen is not None
    assert seen.sessions == 321
    manager.stats_extra = {"sessions": 321, "agents_per_user": {"ann": 1}}
    assert (await from_manager(manager)).problem is SignalProblem.MISSING


@pytest.mark.parametrize("sessions", [-1, 20_001])
async def test_impossible_statistics_are_absurd(sessions: int) -> None:
    manager = StandInManager(desired=20)
    manager.sessions = sessions
    assert (await from_manager(manager)).problem is SignalProblem.ABSURD


async def test_malformed_statistics_are_missing_and_name_the_field() -> None:
    manager = StandInManager()
    manager.stats_extra = {"capacity": "plenty"}
    reading = await from_manager(manager)
    assert reading.problem is SignalProblem.MISSING
    assert reading.detail is not None
    assert "capacity" in reading.detail
