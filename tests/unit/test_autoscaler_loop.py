"""The autoscaler loop against a stand-in manager with a real compare-and-set."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry

from hypercore_agents.api.pool import ScalingReason, SignalProblem, SizeOutcome
from hypercore_agents.autoscaler.app import build, create_app
from hypercore_agents.autoscaler.loop import Autoscaler
from hypercore_agents.autoscaler.settings import AutoscalerSettings
from hypercore_agents.observability.metrics import AutoscalerMetrics
from support.asgi_server import serving
from support.autoscaler_peers import StandInManager, StandInPrometheus


def settings(url: str, **given: Any) -> AutoscalerSettings:
    return AutoscalerSettings(
        _env_file=None,
        manager_url=url,
        **{"autoscaler_signals": "manager", "autoscaler_timeout": 1.0, **given},
    )


@contextlib.asynccontextmanager
async def autoscaler(manager: StandInManager, **given: Any) -> AsyncIterator[Autoscaler]:
    """Return an autoscaler whose steps the test runs."""
    async with serving(manager.app) as url, aiohttp.ClientSession() as http:
        yield build(settings(url, **given), http, AutoscalerMetrics(CollectorRegistry()))


def counted(scaler: Autoscaler, name: str, **labels: str) -> float:
    value = scaler._metrics.registry.get_sample_value(name, labels)
    assert value is not None
    return value


async def test_the_size_is_set_with_the_version_that_was_read() -> None:
    manager = StandInManager(desired=10)
    manager.sessions = 850
    async with autoscaler(manager) as scaler:
        await scaler.step()
    assert [(size.desired, size.version) for size in manager.writes] == [(13, 2)]
    (decision,) = scaler.decisions(10).decisions
    assert (decision.outcome, decision.reason, decision.desired) == (SizeOutcome.APPLIED, ScalingReason.LOAD, 13)
    assert counted(scaler, "hypercore_autoscaler_decisions_total", action="grow", reason="load") == 1
    assert counted(scaler, "hypercore_autoscaler_desired_agents") == 13


async def test_version_conflicts_are_left_to_the_next_step() -> None:
    manager = StandInManager(desired=10)
    manager.sessions = 850
    manager.between = 40
    async with autoscaler(manager) as scaler:
        await scaler.step()
        assert (manager.size.desired, manager.refused) == (40, 1)
        assert scaler.decisions(1).decisions[0].outcome is SizeOutcome.CONFLICT
        await scaler.step()
    assert manager.size.desired == 40
    assert scaler.decisions(1).decisions[0].outcome is SizeOutcome.UNCHANGED


async def test_two_autoscalers_do_not_scale_twice() -> None:
    manager = StandInManager(desired=10)
    manager.sessions = 1000
    async with autoscaler(manager) as one, autoscaler(manager) as other:
        await asyncio.gather(one.step(), other.step())
    assert manager.size.desired == 20
    assert len(manager.writes) == 1


async def test_dry_runs_decide_without_setting_the_size() -> None:
    manager = StandInManager(desired=10)
    manager.sessions = 850
    async with autoscaler(manager, autoscaler_dry_run=True) as scaler:
        await scaler.step()
    assert manager.writes == []
    shown = scaler.decisions(10)
    assert shown.dry_run
    assert (shown.decisions[0].outcome, shown.decisions[0].desired) == (SizeOutcome.DRY_RUN, 13)


async def test_repeated_hold_decisions_are_merged_and_history_is_bounded() -> None:
    manager = StandInManager(desired=10)
    manager.sessions = 700
    async with autoscaler(manager, autoscaler_decisions=3) as scaler:
        for _ in range(5):
            await scaler.step()
        (decision,) = scaler.decisions(10).decisions
        assert (decision.times, decision.outcome) == (5, SizeOutcome.UNCHANGED)
        for sessions in (900, 1500, 2600, 4000, 7000):
            manager.sessions = sessions
            await scaler.step()
        assert len(scaler.decisions(10).decisions) == 3
        assert len(scaler.decisions(2).decisions) == 2


@pytest.mark.parametrize("sessions", [-5, 10**9, "a few", 1.5])
async def test_absurd_statistics_leave_the_size_and_are_reported(sessions: object) -> None:
    manager = StandInManager(desired=30)
    manager.sessions = sessions
    async with autoscaler(manager) as scaler:
        for _ in range(3):
            await scaler.step()
    assert manager.writes == []
    (decision,) = scaler.decisions(10).decisions
    assert (decision.reason, decision.desired, decision.times) == (ScalingReason.NO_DATA, 30, 3)
    assert decision.problem is not None
    assert scaler.problems()["signals"] == decision.problem


@pytest.mark.parametrize(
    "raw",
    [
        PlainTextResponse("no", status_code=500),
        PlainTextResponse("no", status_code=401),
        JSONResponse({"desired": -4, "version": 2}),
        JSONResponse({"desired": 10**7, "version": 2}),
        JSONResponse({"version": 2}),
        Response("{"),
    ],
)
async def test_no_size_is_written_to_a_manager_with_invalid_answers(raw: Response) -> None:
    manager = StandInManager(desired=30)
    manager.sessions = 2900
    manager.raw = raw
    async with autoscaler(manager) as scaler:
        await scaler.step()
        assert manager.writes == []
        assert scaler.problems()["manager"] is not None
        manager.raw = None
        await scaler.step()
    assert scaler.problems()["manager"] is None
    assert len(manager.writes) == 1


async def test_a_slow_manager_delays_a_step_at_most_by_the_timeout() -> None:
    manager = StandInManager(desired=30)
    manager.hang.clear()
    async with autoscaler(manager, autoscaler_timeout=0.1) as scaler:
        async with asyncio.timeout(5):
            await scaler.step()
        assert "did not answer" in str(scaler.problems()["manager"])
        manager.hang.set()
        await scaler.step()
        assert scaler.problems()["manager"] is None


async def test_rejected_writes_are_failures_and_are_retried() -> None:
    manager = StandInManager(desired=10)
    manager.sessions = 850
    manager.write_status = 503
    async with autoscaler(manager) as scaler:
        await scaler.step()
        assert scaler.decisions(1).decisions[0].outcome is SizeOutcome.FAILED
        manager.write_status = None
        await scaler.step()
    assert manager.size.desired == 13


async def test_the_token_is_sent_and_never_shown() -> None:
    manager = StandInManager()
    async with autoscaler(manager, autoscaler_token="secret-bearer-0123456789") as scaler:
        await scaler.step()
        shown = scaler.decisions(10).model_dump_json()
    assert manager.authorization == {"Bearer secret-bearer-0123456789"}
    assert "secret-bearer" not in shown


async def test_the_loop_survives_a_manager_restart() -> None:
    manager = StandInManager(desired=10)
    manager.sessions = 500
    async with contextlib.AsyncExitStack() as stack:
        served = contextlib.AsyncExitStack()
        url = await served.enter_async_context(serving(manager.app))
        app = create_app(settings(url, autoscaler_interval=0.1))
        own = await stack.enter_async_context(serving(app))
        http = await stack.enter_async_context(aiohttp.ClientSession())

        async def ready(wanted: int) -> None:
            async with asyncio.timeout(20):
                while True:
                    async with http.get(f"{own}/ready") as answer:
                        if answer.status == wanted:
                            return
                    await asyncio.sleep(0.01)

        await ready(200)
        await served.aclose()
        await ready(503)
        async with http.get(f"{own}/health") as answer:
            health = await answer.json()
        assert answer.status == 200
        assert (health["status"], health["checks"]["manager"]["ok"]) == ("degraded", False)
        async with http.get(f"{own}/v1/autoscaler/decisions", params={"limit": "1"}) as answer:
            (decision,) = (await answer.json())["decisions"]
        assert (decision["outcome"], decision["action"], decision["desired"]) == ("failed", "hold", None)
        assert "cannot be reached" in decision["problem"]
    assert manager.writes == []


async def test_the_app_shows_decisions_and_metrics_and_names_bad_parameters() -> None:
    manager = StandInManager(desired=10)
    manager.sessions = 850
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(manager.app))
        own = await stack.enter_async_context(serving(create_app(settings(url, autoscaler_interval=0.1))))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        shown: list[Any] = []
        async with asyncio.timeout(20):
            while not shown:
                async with http.get(f"{own}/v1/autoscaler/decisions") as answer:
                    shown = (await answer.json())["decisions"]
        assert (shown[-1]["reason"], shown[-1]["desired"]) == ("load", 13)
        async with http.get(f"{own}/metrics") as answer:
            text = await answer.text()
        assert 'hypercore_autoscaler_decisions_total{action="grow",reason="load"} 1.0' in text
        assert 'hypercore_autoscaler_signal_problems_total{problem="stale"} 0.0' in text
        async with http.get(f"{own}/v1/autoscaler/decisions", params={"limit": "0"}) as answer:
            refused = await answer.json()
        assert (answer.status, refused["error"]["details"]["field"]) == (400, "limit")
    assert manager.size.desired == 13


async def test_missing_prometheus_data_leaves_the_size_unchanged() -> None:
    manager, prometheus = StandInManager(desired=30), StandInPrometheus()
    prometheus.healthy(sessions=100, running=30)
    async with (
        serving(prometheus.app) as url,
        autoscaler(
            manager,
            autoscaler_signals="prometheus",
            prometheus_url=url,
            stabilisation_window=0,
            panic_window=0,
        ) as scaler,
    ):
        prometheus.values["sum((agent_active_sessions"] = None
        for _ in range(5):
            await scaler.step()
        assert manager.size.desired == 30
        assert scaler.decisions(1).decisions[0].reason is ScalingReason.NO_DATA
        problems = counted(scaler, "hypercore_autoscaler_signal_problems_total", problem=SignalProblem.STALE)
        assert problems == 5
        prometheus.healthy(sessions=100, running=30)
        await scaler.step()
        assert manager.size.desired == 10
