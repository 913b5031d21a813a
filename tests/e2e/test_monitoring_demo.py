"""`up --demo --monitoring` under a real load: Prometheus has data for every panel and rule, and `down` stops it.

One deployment serves the module; the last test stops it.
"""

import asyncio
import json
import math
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import render
from panels import DECISIONS, ROWS, PanelSpec, resolved
from support.monitoring_servers import query
from support.ports import free_address
from support.waiting import until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.prometheus,
]
PANELS = [panel for row in ROWS for panel in row.panels]


@dataclass
class Demo:
    manager: str
    prometheus: str
    alertmanager: str
    environment: dict[str, str]
    chats: int = 0

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hypercore_agents", *arguments],
            env=self.environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    names = ("manager", "gateway", "simulator", "autoscaler", "operator", "prometheus", "alertmanager")
    at = {name: free_address() for name in names}
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "PYTHONPATH")}
    environment = kept | {
        "STATE_DIR": str(tmp_path_factory.mktemp("monitored") / "state"),
        "LISTEN_ADDR": at["manager"],
        "GATEWAY_ADDR": at["gateway"],
        "SIMULATOR_LISTEN": at["simulator"],
        "AUTOSCALER_ADDR": at["autoscaler"],
        "GATEWAY_OPERATOR_ADDR": at["operator"],
        "PROMETHEUS_URL": f"http://{at['prometheus']}",
        "ALERTMANAGER_URL": f"http://{at['alertmanager']}",
        "COMPUTE_BACKEND": "process",
        "MIN_AGENTS": "1",
        "MAX_AGENTS": "3",
        "AUTOSCALER_INTERVAL": "1",
        "STABILISATION_WINDOW": "2",
        "LIVE_SESSIONS": "2",
        "SIMULATOR_RATE": "100",
    }
    manager = f"http://{at['manager']}"
    demo = Demo(manager, environment["PROMETHEUS_URL"], environment["ALERTMANAGER_URL"], environment)
    started = demo.command("up", "--demo", "--monitoring", "--detach")
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        asyncio.run(load(demo))
        yield demo
    finally:
        demo.command("down", "--purge")


async def load(demo: Demo) -> None:
    """Generate load: chats of more sessions than CLI processes, errors, a spawn, a pool that grows and shrinks."""
    timeout = aiohttp.ClientTimeout(total=90)
    async with aiohttp.ClientSession(base_url=demo.manager, timeout=timeout) as http:
        await until(
            lambda: query(demo.prometheus, 'up{job="agents"} == 1'), what="a first scrape of an agent"
        )  # counters start at 0, so that later changes show as rates
        async with http.get("/v1/pool") as answer:
            pool = await answer.json()
        async with http.put("/v1/pool", json={"desired": 2, "version": pool["version"]}) as answer:
            assert answer.status == 200, await answer.text()
        async with http.post("/v1/agents/spawn", json={"user_id": "ada", "cores": 1, "memory": 1024}) as answer:
            assert answer.status == 200, await answer.text()
        sessions: list[str] = []
        for number in range(3):
            sessions.append((await chat(http, f"ada-{number}"))["session_id"])
        for _ in range(3):
            for number, session in enumerate(sessions):
                await chat(http, f"ada-{number}", session_id=session)
        async with http.post("/v1/agent/chat", json={"user_id": "ada", "prompt": ""}) as answer:
            assert answer.status == 400
        with pytest.raises(AssertionError):
            await chat(http, "eve", session_id=sessions[0])  # another user's session
        demo.chats = 12
        deadline = time.monotonic() + 60
        missing = PANELS
        while missing and time.monotonic() < deadline:  # rates need several scrapes under load
            for number, session in enumerate(sessions):
                await chat(http, f"ada-{number}", session_id=session)
                demo.chats += 1
            missing = [panel for panel in missing if not await numbers(demo, panel)]


async def chat(http: aiohttp.ClientSession, user: str, **more: Any) -> dict[str, Any]:
    body = {"user_id": user, "prompt": "Tell me of the sea.", **more}
    async with http.post("/v1/agent/chat", json=body) as answer:
        document = await answer.json()
        assert answer.status == 200, document
        assert isinstance(document, dict)
        return document


async def numbers(demo: Demo, panel: PanelSpec) -> bool:
    """Return whether each query of a panel returns a number."""
    for asked in panel.queries:
        series = await query(demo.prometheus, resolved(asked.expression))
        if not asked.sparse and not any(math.isfinite(float(one["value"][1])) for one in series):
            return False
    return True


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
async def test_every_query_of_every_panel_returns_data(demo: Demo, panel: PanelSpec) -> None:
    for asked in panel.queries:
        # short-lived values may have passed: query the whole run
        expression = f"last_over_time(({resolved(asked.expression)})[5m:1s])"

        async def has_data(expression: str = expression) -> bool:
            series = await query(demo.prometheus, expression)
            return any(math.isfinite(float(one["value"][1])) for one in series)

        if not asked.sparse or panel.title == "Errors at the front door":
            await until(has_data, pause=0.5, what=f"data of {asked.expression}")


async def test_metrics_reflect_the_load(demo: Demo) -> None:
    async def number(expression: str) -> float:
        series = await query(demo.prometheus, expression)
        return float(series[0]["value"][1])

    ended = f'hypercore_manager_turns_total{{status="ok"}} == {demo.chats}'
    await until(lambda: query(demo.prometheus, ended), what="the last turn's scrape")
    assert await number("sum(agent_active_sessions) > 0") > 0
    assert await number('sum(hypercore_agent_spawn_total{status="success"})') >= 2
    assert await number("sum(hypercore_gateway_tokens_total) > 0") > 0
    assert await number("sum(hypercore_gateway_cost_usd_total) > 0") > 0
    assert await number("sum(agent_cli_memory_bytes) / 2^20") > 50
    assert await number("sum(agent_live_sessions) + sum(agent_parked_sessions) == sum(agent_active_sessions)") > 0
    for phase in ("wait", "sandbox", "enrol"):
        assert await number(f'hypercore_agent_spawn_phase_seconds_count{{phase="{phase}"}}') >= 2, phase


async def test_autoscaler_decisions_appear_as_annotations(demo: Demo) -> None:
    await until(lambda: query(demo.prometheus, f"last_over_time(({resolved(DECISIONS)})[5m:1s])"), what="a decision")


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


async def test_the_rules_are_loaded_and_every_job_is_scraped(demo: Demo) -> None:
    groups = (await asyncio.to_thread(get, f"{demo.prometheus}/api/v1/rules"))["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 25
    assert {rule["health"] for rule in rules} == {"ok"}
    up = {series["metric"]["job"] for series in await query(demo.prometheus, "up == 1")}
    assert up == {"manager", "gateway", "autoscaler", "agents"}
    found = await asyncio.to_thread(get, f"{demo.prometheus}/api/v1/alertmanagers")
    (known,) = found["data"]["activeAlertmanagers"]
    assert known["url"].startswith(demo.alertmanager)
    health = await asyncio.to_thread(get, f"{demo.manager}/health")
    assert health["dependencies"]["prometheus"]["status"] == "ok"


def test_all_panels_are_rendered(demo: Demo, tmp_path: Path) -> None:
    target = tmp_path / "dashboard.png"
    shown = render.render(demo.prometheus, target, minutes=5)
    assert set(shown) == {panel.title for panel in PANELS}
    assert all(shown.values()), shown
    assert target.read_bytes().startswith(b"\x89PNG")
    if keep := os.environ.get("KEEP_DASHBOARD_PNG"):
        Path(keep).write_bytes(target.read_bytes())


def test_down_stops_monitoring_with_the_platform(demo: Demo) -> None:
    stopped = demo.command("down")
    assert stopped.returncode == 0, stopped.stderr
    for url in (demo.prometheus, demo.alertmanager, demo.manager):
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5)
    assert not Path(demo.environment["STATE_DIR"]).exists()
